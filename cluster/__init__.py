"""Launching and checking: Slurm, Ray, Kubernetes. Nothing imports it.

Files:
    commands     programs of the schedulers
    kubernetes/  training as a RayJob
    launch       the launchers, and status, logs, stop
    node_checks  what one node finds by itself
    pair_check   all-reduce between two nodes
    preflight    checks of a cluster before training
    ray/         training as a job of a Ray cluster
    record       what was submitted
    request      what they ask a cluster for
    slurm/       training as a Slurm job
"""
