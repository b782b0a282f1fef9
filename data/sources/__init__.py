"""What can be prepared. Knows no shards.

Files:
    arrays          images in an array; the digits
    cifar10         CIFAR-10
    cifar10_pickle  its pickles, without executing them
    files           folders and zip files
    find            which kind of source lies at a path
    lmdbs           LSUN and CelebA-HQ databases
    mnist           MNIST, Fashion-MNIST, StackedMNIST
    points          25 Gaussians in the plane
    source          what a source is
    tars            WebDataset shards of others
"""
