"""What a step computes. Knows no config, no files and no processes.

Files:
    adversarial  the game of G and D: one update of each
    batch_split  a global batch over ranks and forward passes
    ema          the averaged generator
    gaussian     an ordinary denoising diffusion model: one update of G
    losses       adversarial objectives by name, R1 and R2
    method       what a method of training is; the networks that it is given
    methods      the methods by name
    pairs        from images to noisy pairs, fused on a GPU
    randomness   Philox: draws as a pure function
    schedules    learning rates
    statistics   sums that updates return, and how they become curves
"""
