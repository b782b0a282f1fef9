"""The training program. May import models and data.

Files here are commands (`python -m trainer.X`); folders are their parts.

Files:
    ablation       the paper's table over T and z, on a small data set
    algorithm/     what a training step computes
    bench/         measures how fast a config trains, samples, reads and saves
    checkpoint/    what a run saves
    config/        every setting: defined, read strictly, checked, estimated
    configs/       one YAML file per data set
    driver/        the process that starts the ranks
    engine/        backward pass, gradient reduction, optimizer update
    evaluate/      measures the quality of samples
    modes          counts the modes of StackedMNIST in a run's samples
    points         quality of samples of the 25 Gaussians, and a picture
    rank/          one rank, from start to end
    run            the command: parse, check, launch on Ray, summarize
    sample/        draws images from a run
    tracking/      from rank 0 to the trackers, through a spool
    verify_resume  proves that kills do not change the result
    worker         the command that runs one rank, with or without torchrun
"""
