"""What a run saves. Independent of the training loop.

Files:
    bucket        checkpoints in a bucket or other remote storage
    command       python -m trainer.checkpoint: list, verify, prune, convert, export
    fingerprint   hashes of a checkpoint's contents
    format        the checkpoint format: manifest, files, reading by ranges
    lease         allows one run at a time to write to a directory
    lease_places  where leases are kept
    part          one rank's safetensors file, laid out in host memory
    resume        where a run resumes: --resume, and what is moved aside
    retention     which checkpoints are kept
    snapshot      averaged weights with their config, initial weights
    storage       where checkpoints are stored; a folder
    whole         a checkpoint as one state: conversion and export
    writer        saving in parallel with training
"""
