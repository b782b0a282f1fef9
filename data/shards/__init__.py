"""A prepared data set: its index, files and samples. Knows neither sources nor the order of training.

Files:
    cache         bounded folder, shared by the processes of a host
    decode        bytes to pixels
    files         local or downloaded files of shards
    grid          a grid of images as one picture
    index         the index of a prepared data set
    offsets       where the samples of a shard are
    reader        random access to samples
    verification  checks hashes and sizes before training
    writer        writes tar shards and the index
"""
