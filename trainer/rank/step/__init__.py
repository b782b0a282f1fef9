"""What the device does in a step: images in, draws, an update of each network. Knows no hooks, checkpoints or trackers.

Files:
    graphs   work that repeats, recorded as a CUDA graph and replayed
    inputs   a step's images on the device, in memory that stays the same
    share    a rank's part of each global batch
    updates  the draws and the updates of a step, made anew or replayed
"""
