"""Images out of a run.

Files:
    command  python -m trainer.sample
    draw     images of a run: image i is a function of weights, seed and i
    images   grids, folders, npz
    scatter  points of the plane as a picture
"""
