"""What ranks of tests need, imported once by the process that they are forked from."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import trainer.engine.zero_on_cpu
import trainer.worker  # noqa: F401

torch.set_num_threads(1)
# DeepSpeed writes every parameter of a network at ZeRO-3 into a text that it then does not print.
torch.set_printoptions(threshold=0, edgeitems=1)
