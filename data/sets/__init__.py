"""What is done with prepared data sets: look at, check, copy and join them. Knows no sources.

Files:
    arguments    command-line arguments
    command      python -m data.prepare inspect, verify, push, pull, merge
    inspect      summary and contact sheet
    merge        joins data sets of one form
    near         near-duplicates between two data sets
    origin       what a data set was made from
    terminal     messages and progress bars
    transfer     copies to and from a URL
    verify       hashes and decodes everything
    work_folder  hidden folder of unfinished work, and its lock
"""
