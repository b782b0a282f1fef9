"""Networks and the diffusion process. Knows neither data nor trainer.

Files:
    blocks               residual block, attention, latent mapping
    diffusion            schedules, pairs, posterior
    discriminator        discriminators for small and for large images
    dropout              dropout with masks from outside
    generator            NCSN++ U-Net with adaptive group norm
    layers               initialization, group norm, time and label embedding
    minibatch_deviation  minibatch standard deviation
    mlp                  perceptrons for points of the plane
    networks             the networks that a config names
    published/           networks from the authors' released files
    pyramids             side paths of the image
    resample             FIR and nearest resampling
    sampling             ancestral and deterministic sampling
    shapes               shapes as types
"""
