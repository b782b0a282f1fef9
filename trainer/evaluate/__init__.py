"""How good samples are.

Files:
    classifier       a small classifier whose features measure samples
    command          python -m trainer.evaluate
    during_training  the same during training
    features         networks whose features measure; what codecs do to samples
    quality          FID, KID, Inception score, precision, recall, density, coverage
    reference        samples against a reference, over all ranks
    report           figures as a table
"""
