"""Values that ranks send to one another: JSON and raw tensors. torch's object collectives would unpickle them."""

import json
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import UInt8
from torch import Tensor

_TENSOR = "__tensor__"
_LENGTH_BYTES = 8


def encode(value: Any) -> UInt8[Tensor, " b"]:
    """The bytes of a value that consists of dicts, lists, tuples, strings, numbers, None and CPU tensors.

    Layout: 8 bytes with the length of the JSON, the JSON, then the bytes of the tensors in the order of the JSON.

    Raises:
        TypeError: it contains something else.
    """
    tensors: list[Tensor] = []

    def described(item: object) -> dict[str, list[Any]]:
        if not isinstance(item, Tensor):
            raise TypeError(f"ranks cannot send a {type(item).__name__}: allowed are JSON values and tensors")
        tensors.append(item.detach().contiguous())
        return {_TENSOR: [str(item.dtype).removeprefix("torch."), list(item.shape)]}

    text = json.dumps(value, default=described).encode()
    head = bytearray(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    return torch.cat([torch.frombuffer(head, dtype=torch.uint8), *(x.reshape(-1).view(torch.uint8) for x in tensors)])


def decode(content: UInt8[Tensor, " b"]) -> Any:
    """The value of `encode`'s bytes; tuples have become lists.

    Raises:
        ValueError: these are not such bytes.
    """
    end = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES].numpy().tobytes(), "little")
    start = end

    def restored(item: dict[str, Any]) -> Any:
        nonlocal start
        if item.keys() != {_TENSOR}:
            return item
        name, shape = item[_TENSOR]
        dtype = getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{name} is not a dtype")
        tensor = torch.empty(shape, dtype=dtype)
        raw = tensor.view(-1).view(torch.uint8)
        if start + len(raw) > len(content):
            raise ValueError("the message is too short for its tensors")
        raw.copy_(content[start : start + len(raw)])
        start += len(raw)
        return tensor

    return json.loads(content[_LENGTH_BYTES:end].numpy().tobytes(), object_hook=restored)


def broadcast(value: Any, group: Any) -> Any:
    """Rank 0's value, on every rank of a gloo group. A collective."""
    content = encode(value)
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=0, group=group)
    if dist.get_rank() != 0:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, src=0, group=group)
    return decode(content)


def all_gather(value: Any, group: Any) -> list[Any]:
    """Every rank's value, ordered by rank, on every rank of a gloo group. A collective."""
    content = encode(value)
    number = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(number)]
    dist.all_gather(lengths, torch.tensor([len(content)]), group=group)
    sizes = [int(length) for length in lengths]
    received = torch.empty(sum(sizes), dtype=torch.uint8)
    # Not all_gather: gloo's thread would copy a long message with OpenMP, which starts more threads that never end. If
    # there are more of them than cores, all sleep between operations: a rank of two threads on two cores would train
    # at half of its speed from then on.
    dist.all_to_all_single(received, content.repeat(number), sizes, [len(content)] * number, group=group)
    return [decode(part) for part in received.split(sizes)]
