"""Networks that samples are measured in, with the very weights that others use. Knows no figures and no reference.

Files:
    dinov2     DINOv2's ViT-L/14
    features   what a network gives for images; published ones and files; codecs applied to samples
    inception  Inception of 2015, which FID is defined with, and three rules of resizing for it
    lite0      EfficientNet-Lite0 with its ImageNet weights
    published  Inception and DINOv2 by the names that the command knows
    weights    their weights by SHA-256: found, fetched or converted
"""
