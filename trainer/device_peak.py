"""What a device can do at best, measured on it: the rate of one large matrix product."""

import time

import torch

_SIZES = {"cuda": 8192, "cpu": 1024}
_ROUNDS = 10


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second, two for a multiply-add, of the fastest of some square matrix products.

    Args:
        device: with the number of threads and the number formats that are set.
        dtype: of the factors.
    """
    size = _SIZES.get(device.type, 1024)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    fastest_s = float("inf")
    for _ in range(_ROUNDS):
        _wait(device)
        began = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return 2 * size**3 / fastest_s


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
