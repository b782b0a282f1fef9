"""Measures the quality of samples. Independent of the training loop.

Files:
    card             figures in a file with hashes, and their check
    classifier       a small classifier for measuring samples
    command          python -m trainer.evaluate
    during_training  evaluation during training
    judges           which network measures
    kept             features of a reference in files
    measuring        the command with a network, on all ranks
    neighbours       samples beside their nearest training images
    networks/        networks that measure, other than the classifier
    picture          real images, samples and curves in one picture
    quality          FID, KID, Inception score, precision, recall, density, coverage
    reference        measuring samples against a reference, over all ranks
    report           results as a table
"""
