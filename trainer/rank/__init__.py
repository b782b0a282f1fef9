"""One rank, from start to end. Independent of Ray.

Files:
    build            builds the networks in their engines, the average and the guard
    divergence       counts, undoes and diagnoses skipped updates, and says when D learns nothing
    fault_injection  a worker that kills itself, for trainer.verify_resume
    hooks            work between steps: curves, grids, evaluation, checkpoints
    loop             the training loop of one rank
    metrics          sums of statistics, times of a step
    progress         status of a run, and the bar
    replaced         the list of damaged samples
    run_checkpoints  the checkpoints of a run, as a rank sees them
    run_folder       the run directory: its permissions and its contents
    state            what a checkpoint holds, and how a rank restores it
    step/            what the device does in a step
    watchdog         ends a rank that hangs, and reports its stacks
    worker           builds, resumes, trains, closes
"""
