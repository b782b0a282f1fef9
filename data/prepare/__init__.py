"""Turns images into shards. Independent of how training reads them.

Files:
    arguments  command-line arguments
    columns    columns of third-party WebDataset shards
    command    python -m data.prepare
    encode     crop, resize, encode
    filters    leaves images out
    job        the task, and whether it is done
    journal    finished shards, for a restart
    on_ray     does the work on a Ray cluster
    origin     whether the source is still the same
    places     where the result goes
    rates      how long each part takes
    where      conditions on columns
    work       runs a preparation
"""
