"""Image collections that can be prepared. Imports no shard code.

Files:
    arrays   images in an array; the digits, 25 Gaussians in the plane
    cifar10  CIFAR-10
    classes  class folders, labels of dataset.json
    files    folders and zip files
    find     finds the kind of a source
    kinds    tells image files from others, and counts those
    lmdbs    LSUN and CelebA-HQ databases
    mnist    MNIST, Fashion-MNIST, StackedMNIST
    pairs    pairs for image-to-image translation
    remote   files at a URL
    source   interface of a source
    tables   Parquet and Arrow tables, Hugging Face data sets
    tars     third-party WebDataset shards
"""
