"""What a step computes. Knows no config, no files and no processes.

Files:
    batch_split  a global batch over ranks and forward passes
    ema          the averaged generator
    losses       adversarial objectives by name, R1 and R2
    pairs        from images to noisy pairs, fused on a GPU
    randomness   Philox: draws as a pure function
    regression   objective gaussian: an ordinary diffusion model
    schedules    learning rates
    step         one D update, one G update: the algorithm
"""
