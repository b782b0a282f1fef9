"""Draws images from a run. Knows neither the training loop nor the evaluation.

Files:
    command     python -m trainer.sample
    conditions  what a model that translates is given
    draw        draws images: image i is a function of weights, seed and i
    edit        images made from given ones
    fidelity    PSNR and SSIM of translations
    given       image files in the form of a run's images
    images      reads and writes grids, folders and npz files
    pyfunc      a snapshot as a model of MLflow's registry
    scatter     draws 2-D points as a picture
    tiles       images larger than a model's
    video       writes .mp4 files
    walk        frames between samples
"""
