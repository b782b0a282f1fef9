"""DeepSpeed, and what its first engine and step load, imported for the CPU, so that forked ranks have it."""

import torch
import torch._dynamo

from trainer.engine.zero import import_deepspeed, import_optimizers

import_deepspeed(torch.device("cpu"))
import_optimizers()
