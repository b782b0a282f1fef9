"""Turns images into shards. Independent of how training reads them.

Files:
    arguments  command-line arguments
    columns    columns of third-party WebDataset shards
    command    python -m data.prepare
    encode     crop, resize, encode
    filters    leaves images out
    job        the task, and whether it is done
    journal    finished shards, for a restart
    rates      how long each part takes
    origin     whether the source is still the same
    where      conditions on columns
    work       runs a preparation
"""
