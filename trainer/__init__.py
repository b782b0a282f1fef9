"""The training program. May import models and data.

Files here are commands (`python -m trainer.X`), folders are parts.

Files:
    ablation       the paper's table over T and z, on a small data set
    algorithm/     what a step computes
    bench/         how fast a config trains, samples, reads and saves
    checkpoint/    what a run keeps
    config/        every setting: defined, read strictly, checked, priced
    configs/       one YAML file for each data set
    driver/        the process that starts the ranks
    engine/        backward, reduction, update: who computes a step
    evaluate/      how good samples are
    modes          modes of StackedMNIST that a run reaches
    points         the 25 Gaussians: modes found, and a picture
    rank/          the life of one rank
    run            the command: parse, check, launch on Ray, sum up
    sample/        images out of a run
    tracking/      from rank 0 to the trackers, through a spool
    verify_resume  proves that kills change nothing
    worker         what one rank does: build, resume, train, close; runs without Ray too
"""
