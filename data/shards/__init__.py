"""A prepared data set: its index, files and samples.

Files:
    cache         bounded folder that the processes of a host share
    decode        bytes to pixels
    files         where the file of a shard is: here, or downloaded
    grid          a grid of images as one picture
    index         the index of a prepared data set
    reader        random access to shards
    verification  hashes and sizes before a start
"""
