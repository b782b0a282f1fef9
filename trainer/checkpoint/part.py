"""One rank's part of a checkpoint: a safetensors file laid out in host memory, written and hashed in one pass, read.

safetensors' own writer copies every tensor again and holds the interpreter lock for the whole file, which would block
training. The format is simple enough to write here: 8 bytes with the length of the header, the header as JSON, and the
raw tensors without gaps.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.engine.interface import Fragment

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 2**23
_ALIGNMENT = 8


@dataclass(frozen=True)
class Part:
    """A part in host memory, valid until its `HostMemory` takes the next one.

    Attributes:
        header: the length and the JSON header.
        data: the raw tensors.
    """

    header: bytes
    data: memoryview

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + len(self.data)


class HashingChunks:
    """The bytes of a part in order, hashed as they are read."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[memoryview]:
        yield self._taken(memoryview(self._part.header))
        for start in range(0, len(self._part.data), _CHUNK_BYTES):
            yield self._taken(self._part.data[start : start + _CHUNK_BYTES])

    def _taken(self, chunk: memoryview) -> memoryview:
        self._hash.update(chunk)  # releases the interpreter lock, as the write that follows does
        return chunk

    def sha256(self) -> str:
        """SHA-256 of the chunks read so far, in hex."""
        return self._hash.hexdigest()


class HostMemory:
    """Host memory for one rank's snapshot, reused for each checkpoint; pinned if the device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)

    def take(self, sections: Mapping[str, Iterable[Fragment]], extras: Mapping[str, Mapping[str, Tensor]]) -> Part:
        """Copy tensors; training may change them again when this returns.

        Args:
            sections: fragments by section. Their keys become "SECTION/STATE/PARAMETER", their offsets metadata.
            extras: groups of small tensors; their keys become "extra/GROUP/NAME".
        """
        tensors = {f"extra/{group}/{name}": t for group, members in extras.items() for name, t in members.items()}
        starts: dict[str, str] = {}
        for section, fragments in sections.items():
            for fragment in fragments:
                for state, tensor in fragment.tensors.items():
                    key = f"{section}/{state}/{fragment.name}"
                    tensors[key] = tensor
                    starts[key] = str(fragment.start)
        return self.take_tensors(tensors, starts)

    def take_tensors(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Part:
        """Like `take`, with the keys of the file.

        Args:
            tensors: by key.
            metadata: strings by key, for the header.
        """
        # Widest types first, so that every tensor starts at a multiple of its element size.
        ordered = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        places: dict[str, tuple[int, int]] = {}
        position = 0
        for key in ordered:
            tensor = tensors[key]
            end = position + tensor.numel() * tensor.element_size()
            header[key] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            places[key] = (position, end)
            position = end
        memory = self._room(position)
        for key, (start, end) in places.items():
            tensor = tensors[key].detach()
            memory[start:end].view(tensor.dtype).copy_(tensor.reshape(-1), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return Part(len(text).to_bytes(8, "little") + text, memory.numpy().data)

    def reserve(self, num_bytes: int) -> None:
        """Allocate memory and touch it: the system maps a page only on first access, which takes time."""
        self._room(num_bytes).zero_()

    def _room(self, num_bytes: int) -> Tensor:
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the smaller buffer before allocating the larger one
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return self._memory[:num_bytes]


class PartFile:
    """A part on disk. Its header is checked when it is opened; its tensors are read on demand."""

    def __init__(self, file: Path) -> None:
        """Map the file.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a part as `HostMemory` lays one out.
        """
        try:
            self._file: Any = safe_open(file, framework="pt")
            self.keys: Sequence[str] = self._file.keys()
            slices = {key: self._file.get_slice(key) for key in self.keys}
            starts: dict[str, str] = self._file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"it cannot be read as safetensors: {error}") from error
        for key, view in slices.items():
            if key.count("/") < 2 or not key.isprintable() or view.get_dtype() not in _DTYPES.values():
                raise ValueError(f"it holds {key!r:.100}, which is no tensor of a checkpoint")
        self.starts: dict[str, int] = {}
        """Place of each fragment in its flattened parameter."""
        for key, start in starts.items():
            is_number = start.isascii() and start.isdigit() and len(start) <= 18
            view = slices.get(key)
            if not is_number or view is None or len(view.get_shape()) != 1 or view.get_dtype() != "F32":
                raise ValueError(f"its header says of {key!r:.100} that it begins at {start!r:.50}, which cannot be")
            self.starts[key] = int(start)
        self._slices = slices

    def stop(self, key: str) -> int:
        """Where a fragment ends in its flattened parameter."""
        return self.starts[key] + self._slices[key].get_shape()[0]

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened parameter, float32; they must be in this fragment."""
        first = self.starts[key]
        return self._slices[key][start - first : stop - first]

    def tensor(self, key: str) -> Tensor:
        """A whole tensor."""
        return self._file.get_tensor(key)
