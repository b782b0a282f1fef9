"""What GPUs can do at most, by their vendors' data sheets."""

from dataclasses import dataclass
from typing import Literal

from data.storage.errors import UserError

Precision = Literal["fp32", "tf32", "bf16"]
"""Number type of the products; see training.precision."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The limits of a GPU."""

    title: str
    """Its name and form."""
    bf16_tflops: float
    """TFLOP/s of dense bfloat16 matrix products that are summed in float32."""
    tf32_tflops: float
    """TFLOP/s of dense TF32 matrix products."""
    fp32_tflops: float
    """TFLOP/s in float32, without tensor cores."""
    gb_per_s: float
    """10^9 bytes per second from and to its memory."""
    memory_gb: float
    """Its memory in 10^9 bytes."""

    def flops_per_s(self, precision: Precision) -> float:
        """FLOP/s of matrix products with factors of this precision."""
        return 1e12 * {"bf16": self.bf16_tflops, "tf32": self.tf32_tflops, "fp32": self.fp32_tflops}[precision]


# Where a data sheet gives the rate with sparsity, the dense rate is half of it.
GPUS = {
    # NVIDIA H100 Tensor Core GPU data sheet, column H100 SXM: BF16 1,979 and TF32 989 with sparsity; 3.35 TB/s.
    "h100": Gpu(
        title="NVIDIA H100 SXM 80GB",
        bf16_tflops=989.5,
        tf32_tflops=494.5,
        fp32_tflops=67.0,
        gb_per_s=3350,
        memory_gb=80,
    ),
    # NVIDIA H200 Tensor Core GPU data sheet, column H200 SXM: BF16 1,979 and TF32 989 with sparsity; 4.8 TB/s.
    "h200": Gpu(
        title="NVIDIA H200 SXM 141GB",
        bf16_tflops=989.5,
        tf32_tflops=494.5,
        fp32_tflops=67.0,
        gb_per_s=4800,
        memory_gb=141,
    ),
    # NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB SXM: dense rates are given.
    "a100": Gpu(
        title="NVIDIA A100 SXM 80GB",
        bf16_tflops=312,
        tf32_tflops=156,
        fp32_tflops=19.5,
        gb_per_s=2039,
        memory_gb=80,
    ),
    # NVIDIA L40S data sheet: dense rates are given.
    "l40s": Gpu(
        title="NVIDIA L40S 48GB",
        bf16_tflops=362.05,
        tf32_tflops=183,
        fp32_tflops=91.6,
        gb_per_s=864,
        memory_gb=48,
    ),
    # NVIDIA Ada GPU Architecture, appendix A, GeForce RTX 4090: dense rates with float32 sums are given.
    "rtx4090": Gpu(
        title="NVIDIA GeForce RTX 4090 24GB",
        bf16_tflops=165.2,
        tf32_tflops=82.6,
        fp32_tflops=82.6,
        gb_per_s=1008,
        memory_gb=24,
    ),
}
"""The GPUs that predictions are made for, by the names that commands take."""


def gpu_named(name: str) -> Gpu:
    """A GPU by its name, in any case.

    Raises:
        UserError: there is no such GPU in the list.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu is {name}, but predictions are made only for {', '.join(GPUS)}: choose one of these")
    return GPUS[name.lower()]
