"""Order of the samples, and the loader processes that read them. Knows prepared data sets only, no sources.

Files:
    batches          micro-batches, shared memory, bad samples
    partition        who reads what, in which order
    pipeline         WebDataset stages in loader processes
    shuffle_quality  measures how well the order is shuffled
"""
