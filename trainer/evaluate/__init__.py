"""Measures the quality of samples. Independent of the training loop.

Files:
    card             figures in a file with hashes, and their check
    classifier       a small classifier for measuring samples
    command          python -m trainer.evaluate
    during_training  evaluation during training
    features         what a network gives; TorchScript and classifier; codecs applied to samples
    judges           which network measures
    lite0            EfficientNet-Lite0 with its ImageNet weights
    measuring        the command with a network, on all ranks
    neighbours       samples beside their nearest training images
    picture          real images, samples and curves in one picture
    quality          FID, KID, Inception score, precision, recall, density, coverage
    reference        measuring samples against a reference, over all ranks
    report           results as a table
"""
