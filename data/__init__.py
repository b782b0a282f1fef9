"""Images in, ordered uint8 batches out. Imports neither trainer nor models.

Files are commands, folders are parts.

Files:
    bench       measures how fast a data set is read
    fetch/      brings data sets from elsewhere to this disk
    formats/    files of other programs, read safely
    images/     decodes image files of any kind
    prepare/    turns images into shards
    processes/  child processes; they end with their parent
    sets/       inspects, verifies, copies and joins data sets
    shards/     a prepared data set: index, files, samples
    sources/    image collections that can be prepared
    storage/    files and folders, local or at a URL
    stream/     order of the samples; loader processes
"""

import gc

# Importing torch, Ray and MLflow makes hundreds of thousands of objects that stay. From Python's own threshold, 700 new
# ones, they are walked so often that it takes a fifth of the time in which a command starts.
if 0 < gc.get_threshold()[0] < 5_000:  # 0: it is off
    gc.set_threshold(5_000)
