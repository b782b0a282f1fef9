"""From images to shards, and ways to inspect them.

Files:
    arguments    its arguments
    command      python -m data.prepare
    encode       crop, resize, encode
    inspect      summary and contact sheet
    job          what is asked for, and whether it is there
    journal      what is finished, for the next start
    terminal     messages and progress bars
    verify       hash and decode everything
    work         the work behind it
    work_folder  hidden folder of unfinished work, and its lock
    writer       tar shards and index
"""
