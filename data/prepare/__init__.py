"""Turns images into shards. Independent of how training reads them.

Files:
    arguments  command-line arguments
    command    python -m data.prepare
    encode     crop, resize, encode
    job        the task, and whether it is done
    journal    finished shards, for a restart
    origin     whether the source is still the same
    work       runs a preparation
"""
