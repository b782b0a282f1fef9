"""Compares compiled networks with the plain ones, and counts graphs. ARGUMENTS: device, backend of torch.compile.

A program of its own: the tests check shapes at run time, and a compiler cannot trace through those checks.
"""

import sys

import torch
from torch import Tensor

from models.resample import FirDownsample, FirUpsample
from tests.trainer.engine.conformance_rank import micro_batches, networks
from trainer.engine.compiled import CompiledForward, blocks_of


def main(device: str, backend: str) -> None:
    generator, discriminator = (network.to(device) for network in networks())
    pair = micro_batches(0, 8, 8)[0].pair_g
    t, x_t, z = (x.to(device) for x in (pair.t, pair.x_t, pair.z))
    parameters = [*generator.parameters(), *discriminator.parameters()]
    compiled = [CompiledForward(n, blocks_of(n), backend=backend) for n in (generator, discriminator)]
    blocks = sum(len(blocks_of(network)) for network in (generator, discriminator))

    def outputs_and_gradients(G, D) -> list[Tensor]:
        x0_pred = G(x_t, t, z, None)
        logits = D(x0_pred, x_t, t, None)
        return [x0_pred, logits, *torch.autograd.grad(logits.sum(), parameters)]

    pairs = list(zip(outputs_and_gradients(generator, discriminator), outputs_and_gradients(*compiled), strict=True))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    features = torch.randn(2, 4, 8, 6, device=device)
    for layer in (FirDownsample().to(device), FirUpsample().to(device)):
        pairs.append((layer(features), torch.compile(layer, backend=backend, dynamic=False)(features)))
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    failed = sum(network.failed for network in compiled)
    # Each tensor against its own largest element; but a bias before a norm has no gradient, only its rounding.
    floor = 1e-3 * max(plain.abs().max() for plain, _ in pairs)
    errors = [((ours - plain).abs().max() / plain.abs().max().maximum(floor)).item() for plain, ours in pairs]
    sys.stdout.write(f"difference {max(errors):.3g}, graph breaks {breaks}, failed {failed}, ")
    sys.stdout.write(f"graphs {graphs} of {blocks} blocks, compared {len(errors)}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
