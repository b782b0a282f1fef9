"""The method as functions and modules: diffusion, generator, discriminator, sampling. No import of trainer or data."""
