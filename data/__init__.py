"""Images in, ordered uint8 batches out. Knows neither trainer nor models.

Files here are commands, folders are parts.

Files:
    bench       how fast data are read
    prepare/    images to shards, and a look at them
    processes/  processes of ours; all end with their parent
    shards/     a prepared data set: its index, its files, one sample of it
    sources/    what can be prepared
    storage/    files and folders, here or at a URL
    stream/     which samples, in which order, and the processes that bring them
"""
