"""Brings data sets from elsewhere to this disk, where they are kept for the next time. Knows no sources.

Files:
    downloads  a verified copy of a remote file, continued after a stop
    hub        tables on the Hugging Face Hub
    known      CIFAR-10, MNIST and Fashion-MNIST, by their SHA-256
    mirror     local copies of files at a URL
"""
