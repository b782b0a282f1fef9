"""DeepSpeed and what it loads with its first step, imported for the CPU: ranks that are forked afterwards have it."""

import torch
import torch._dynamo

from trainer.engine.zero import import_deepspeed

import_deepspeed(torch.device("cpu"))
