"""A prepared data set: its index, files and samples.

Files:
    cache         bounded folder that the processes of a host share
    decode        bytes to pixels
    files         where the file of a shard is: here, or downloaded
    index         the index of a prepared data set
    offsets       where the samples of a shard are
    reader        random access to shards
    verification  hashes and sizes before a start
"""
