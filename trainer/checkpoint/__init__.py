"""What a run keeps. Knows nothing of the training loop.

Files:
    bucket        a bucket, or other remote storage
    command       python -m trainer.checkpoint: list, verify, prune, convert, export
    fingerprint   hashes of what a checkpoint holds
    format        what a checkpoint is: manifest, files, reading by ranges
    lease         one run at a time writes to a directory
    lease_places  where leases are kept
    part          one rank's safetensors file, laid out in host memory
    retention     which checkpoints stay
    snapshot      averaged weights with their config, initial weights
    storage       where checkpoints lie; a folder
    whole         a checkpoint as one state: conversion and export
    writer        saving beside training
"""
