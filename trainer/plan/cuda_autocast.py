"""What autocast to bfloat16 does on a GPU, for tensors of the meta device, which has no autocast.

The lists are those of CUDA in https://docs.pytorch.org/docs/stable/amp.html, as far as networks can need them. A test
compares them with the operators that torch itself registers for autocast.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


IN_BF16 = _names(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc prelu addmm addmv "
    "addr matmul __matmul__ __rmatmul__ einsum mm mv linear addbmm baddbmm bmm chain_matmul "
    "scaled_dot_product_attention"
)
"""Functions whose float inputs are cast to bfloat16."""
IN_FP32 = _names(
    "__pow__ __rpow__ acos asin cosh cosine_similarity cdist dist erfinv exp expm1 group_norm interpolate "
    "layer_norm log log10 log1p log2 logsumexp norm pow reciprocal renorm rsqrt sinh softplus square tan"
)
"""Functions whose float inputs are cast to float32. `square` is `pow` within torch."""
TO_FP32 = _names("cumprod cumsum log_softmax prod softmax sum")
"""Functions that take any input and give float32, unless they are asked for a dtype."""
TO_WIDEST = _names("addcdiv addcmul atan2 bilinear cross dot scatter_add tensordot vdot")
"""Functions whose float inputs are cast to the widest dtype among them."""


class CudaAutocast(TorchFunctionMode):
    """Inside, functions cast their inputs as `torch.autocast("cuda", torch.bfloat16)` would, seen by autograd.

    Parameters are cast once per context, as there. A function called by one of torch's own Python functions is not
    seen, which makes no difference for those that the networks use.
    """

    _open: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self._cast: dict[int, tuple[Tensor, Tensor]] = {}  # also keeps the parameter, so that no id is used twice

    def __enter__(self) -> Self:
        CudaAutocast._open += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        CudaAutocast._open -= 1
        super().__exit__(*error)

    @classmethod
    def contexts(cls) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Those of a block that runs now and is computed again in the backward pass, then with the casts of now."""
        return nullcontext(), cls() if cls._open else nullcontext()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Cast, then call."""
        name, arguments = getattr(func, "__name__", ""), (tuple(args), dict(kwargs or {}))
        if name in IN_BF16:
            arguments = tree_map_only(Tensor, self._in_bf16, arguments)
        elif name in IN_FP32:
            arguments = tree_map_only(Tensor, _to(torch.float32), arguments)
        elif name in TO_FP32 and arguments[0] and arguments[0][0].dtype == torch.bfloat16:
            arguments[1].setdefault("dtype", torch.float32)
        elif name in TO_WIDEST:
            found: list[torch.dtype] = []
            tree_map_only(Tensor, lambda tensor: found.append(tensor.dtype), arguments)
            if torch.float32 in found:
                arguments = tree_map_only(Tensor, _to(torch.float32), arguments)
        return func(*arguments[0], **arguments[1])

    def _in_bf16(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32 or not (tensor.is_leaf and tensor.requires_grad):
            return _to(torch.bfloat16)(tensor)
        if id(tensor) not in self._cast:
            self._cast[id(tensor)] = tensor, tensor.to(torch.bfloat16)
        return self._cast[id(tensor)][1]


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A cast of floats, but not of float64, which autocast leaves alone."""
    return lambda tensor: tensor.to(dtype) if tensor.dtype in (torch.float32, torch.bfloat16) else tensor
