"""Measures the speed of training, sampling, reading and saving, and counts bytes.

Files:
    authors_update  the authors' update of D, for comparison
    checkpoints     how long a checkpoint blocks training
    command         python -m trainer.bench
    made_images     images for a benchmark without a data set
    measurements    times of training steps, sampling and reading
    overhead        the cost of Ray, tracking and checkpoints on top of the step
    traffic         the bytes that a step moves, as a table
"""
