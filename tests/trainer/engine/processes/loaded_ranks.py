"""What ranks of tests need, imported once by the process that they are forked from."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import trainer.engine.zero_on_cpu
import trainer.worker  # noqa: F401

torch.set_num_threads(1)
