"""Files that an export in diffusers' form carries: they draw images without this project, and import nothing of it.

They are copied as they are. The networks are those of `models`, for inference alone; tests hold them equal, bit by bit.

Files:
    ddgan_generator  the generator as a model of diffusers
    ddgan_scheduler  the denoising step as a scheduler of diffusers
    pipeline         draws images: random numbers, the loop, PIL images
"""
