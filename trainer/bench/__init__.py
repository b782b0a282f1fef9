"""How fast a config trains, samples, reads and saves.

Files:
    authors_update  D's update as the authors run it, to compare
    checkpoints     how long a checkpoint holds training
    command         python -m trainer.bench
    made_images     images for a benchmark without a data set
    measurements    times of steps, sampling and reading
    overhead        what Ray, tracking and checkpoints cost in addition to the step
"""
