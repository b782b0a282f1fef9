"""Measures the speed of training, sampling, reading and saving, and counts bytes. Imports neither Ray nor driver/.

Files:
    checkpoints     how long a checkpoint blocks training
    command         python -m trainer.bench
    gpu             all measurements of a GPU, in a given number of minutes
    kernels         the kernels that take most of the time of a step
    ladder          what makes a step faster, one thing after the other
    made_images     images for a benchmark without a data set
    measurements    times of sampling and reading
    overhead        the cost of Ray, tracking and checkpoints on top of the step
    penalties       how well finite differences estimate R1
    results         the results of the command gpu, as JSON lines and tables
    steps/          the speed of training steps
    traffic         the bytes that a step moves, as a table
    trial           a measurement in a process of its own
"""
