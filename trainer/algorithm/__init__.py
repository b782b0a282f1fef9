"""What a training step computes. Independent of configs, files and processes.

Files:
    adversarial   the adversarial method: one update of D and one of G
    augmentation  random transforms of what the discriminator sees
    auxiliary     the generator's losses next to the game, and the scale of its gradient
    ema           the averaged generator
    gaussian      the gaussian method (DDPM): one update of G
    losses        adversarial objectives by name, R1 and R2
    method        the interface of a training method, and the networks it updates
    methods       the methods by name
    pairs         from images to noisy pairs, fused on a GPU
    penalties     R1 and R2, exact or by finite differences
    randomness    Philox: random numbers as a pure function
    schedules     settings that change over a run
    statistics    sums that updates return, and how they become curves
"""
