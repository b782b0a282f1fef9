"""Files of other programs, read safely. Knows neither sources nor shards.

Files:
    cifar10_pickle  pickles of CIFAR-10, without executing them
    columns         which column of a table holds images, which labels
    layout          subsets and splits by the names of files
    lmdb_reader     reads an LMDB in a process of its own
    spool           a nameless file that holds the images of a table
    tables          Parquet and Arrow files, in batches of rows
"""
