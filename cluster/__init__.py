"""Launching and checking runs on Slurm, Ray and Kubernetes. No other package imports it.

Files:
    commands        runs the schedulers' programs
    kubernetes/     training as a RayJob
    launch          the launchers, and status, logs, stop
    node_checks     checks of a single node
    pair_check      all-reduce between two nodes
    preflight       checks of all nodes before training
    ray/            training as a job of a Ray cluster
    record          records of submitted runs
    request         what a launcher asks a cluster for
    slurm/          training as a Slurm job
    store_ui        MLflow's pages of the runs, behind a password
    sweep/          runs of one config with varied settings
    tracking_check  the tracking server, before a run
"""

import trainer as trainer  # it makes sure that `models` and `data` are those of this project
