"""The life of one rank. Knows no Ray.

Files:
    build            the networks in their engines, the average and the guard
    divergence       updates skipped in a row: counted, undone, explained
    fault_injection  a worker that kills itself, for trainer.verify_resume
    hooks            what happens between steps: curves, grids, figures, checkpoints
    loop             the loop of one rank
    metrics          sums of statistics, times of a step
    progress         status of a run, and the bar
    replaced         the list of damaged samples
    run_checkpoints  the checkpoints of a run, as a rank sees them
    run_folder       the folder of a run, who may read it, what it holds
    state            what a checkpoint holds of a run, and how a rank takes it up
    watchdog         ends a rank that stands still, with its stacks
    worker           builds, resumes, trains, closes
"""
