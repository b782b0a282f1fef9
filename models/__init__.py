"""Networks and the diffusion process. Knows neither data nor trainer.

Files:
    blocks               residual block, attention, latent mapping, image pyramids
    diffusion            schedules, pairs, posterior
    discriminator        discriminators for small and for large images
    dropout              dropout with masks given by the caller
    fused/               fused operators for training on a GPU
    generator            NCSN++ U-Net with adaptive group norm
    haar_blocks          blocks that hand high frequencies past the levels below
    layers               initialization, group norm, embeddings, convolutions in channels_last
    minibatch_deviation  minibatch standard deviation
    networks/            networks of other kinds, and the choice between all of them
    noise_levels         continuous noise levels, and what a generator sees of them
    published/           networks from the authors' released files
    resample             FIR and nearest resampling
    shapes               tensor shapes as types
    wavelets             the Haar domain, in which images may be diffused
"""
