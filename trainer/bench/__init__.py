"""Measures the speed of training, sampling, reading and saving.

Files:
    authors_update  the authors' update of D, for comparison
    checkpoints     how long a checkpoint blocks training
    command         python -m trainer.bench
    made_images     images for a benchmark without a data set
    measurements    times of training steps, sampling and reading
    overhead        the cost of Ray, tracking and checkpoints on top of the step
"""
