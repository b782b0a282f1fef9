"""Networks of other kinds than the published ones, and the choice of the networks that a config describes.

Files:
    build    builds the networks of a config, and finds what they have in common
    mlp      perceptrons for 2-D points
    resnext  a discriminator of ResNeXt blocks
"""
