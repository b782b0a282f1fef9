"""What a training step computes. Independent of configs, files and processes.

Files:
    adversarial   the adversarial method: one update of D and one of G
    augmentation  random transforms of what the discriminator sees
    batch_split   splits a global batch over ranks and forward passes
    ema           the averaged generator
    gaussian      the gaussian method (DDPM): one update of G
    losses        adversarial objectives by name, R1 and R2
    method        the interface of a training method, and the networks it updates
    methods       the methods by name
    pairs         from images to noisy pairs, fused on a GPU
    penalties     R1 and R2, exact or by finite differences
    randomness    Philox: random numbers as a pure function
    schedules     learning rates
    statistics    sums that updates return, and how they become curves
"""
