"""Turns images into shards; inspects and verifies them. Independent of how training reads them.

Files:
    arguments    command-line arguments
    command      python -m data.prepare
    encode       crop, resize, encode
    inspect      summary and contact sheet
    job          the task, and whether it is done
    journal      finished shards, for a restart
    origin       what a data set was made from
    terminal     messages and progress bars
    verify       hashes and decodes everything
    work         runs a preparation
    work_folder  hidden folder of unfinished work, and its lock
    writer       writes tar shards and the index
"""
