"""The size, the cost and the duration of a run, before it starts. Starts nothing, and needs neither GPU nor data.

Files:
    bytes_moved    counts the bytes that operations move
    cost           FLOPs and memory, counted on the meta device
    cuda_autocast  the casts of a GPU's autocast, on the meta device
    gpus           peaks of GPUs, from data sheets
    on_meta        networks and batches on the meta device
    plan           the dry run
    prediction     the time of a run on a named GPU
    preset         settings of a config for GPUs of a given memory
    remembered     results on the meta device, computed once for each kind of arguments
    step_traffic   bytes and FLOPs of a whole training step
"""
