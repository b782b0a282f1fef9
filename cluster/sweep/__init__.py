"""Runs of one config with varied settings: `./launch.sh sweep`.

Each run is a process of trainer.run with a directory of its own, so that it resumes, and is looked at, like any other.
Ray Tune only says when each starts, and, on request, which are not worth going on.

Files:
    combinations  the runs: their settings, directories and checks
    command       the command
    table         how far each run is, with its figures
    tuner         Ray Tune's side
"""
