"""Which samples, in which order. Also the loader processes that bring them.

Files:
    batches          micro-batches, shared memory, bad samples
    partition        who reads what, in which order
    pipeline         WebDataset stages in loader processes
    shuffle_quality  how well that order is shuffled
"""
