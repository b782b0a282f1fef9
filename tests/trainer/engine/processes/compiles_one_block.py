"""Compiles one small network by block with inductor, and prints what the log says. ARGUMENT: the cache's folder."""

import logging
import sys

import torch
from torch import nn

from trainer.engine.compile_cache import CompileCache
from trainer.engine.compiled import CompiledForward


def main(place: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    compiled = CompiledForward(network, list(network), cache=CompileCache(place, torch.device("cpu")))
    for _ in range(2):
        compiled(torch.ones(2, 4)).sum().backward()
    sys.stdout.write(f"failed {compiled.failed}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
