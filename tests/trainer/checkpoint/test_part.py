"""The part that a rank writes is what safetensors reads, whatever the types and shapes."""

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load

from trainer.checkpoint.part import HashingChunks, HostMemory
from trainer.engine.interface import Fragment

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
TYPES += [torch.int8, torch.uint8, torch.bool]


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory(torch.device("cpu"))


def content(chunks: HashingChunks) -> bytes:
    return b"".join(bytes(chunk) for chunk in chunks)


def test_safetensors_reads_every_type_and_shape(memory):
    tensors = {f"{dtype}": (torch.arange(7) % 2).to(dtype) for dtype in TYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0), "matrix": torch.randn(3, 5), "ä/ü": torch.ones(1)}
    tensors["strided"] = torch.randn(6, 4).t()
    written = content(HashingChunks(memory.take_tensors(tensors, {})))
    read = load(written)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor.reshape(read[name].shape)), name
    assert read["strided"].shape == (4, 6)


def test_keys_offsets_and_groups_are_those_of_the_format(memory, tmp_path):
    fragment = Fragment("layer.weight", 40, {"parameter": torch.ones(2), "exp_avg": torch.zeros(2)})
    part = memory.take({"generator": [fragment]}, {"statistics": {"loss": torch.tensor(2.0)}})
    (tmp_path / "part").write_bytes(content(HashingChunks(part)))
    with safe_open(tmp_path / "part", framework="pt") as f:
        assert sorted(f.keys()) == [
            "extra/statistics/loss",
            "generator/exp_avg/layer.weight",
            "generator/parameter/layer.weight",
        ]
        assert f.metadata() == {"generator/exp_avg/layer.weight": "40", "generator/parameter/layer.weight": "40"}
    assert part.num_bytes == (tmp_path / "part").stat().st_size


def test_hash_is_that_of_the_file_and_chunks_may_be_many(memory, monkeypatch):
    monkeypatch.setattr("trainer.checkpoint.part._CHUNK_BYTES", 1000)
    part = memory.take_tensors({"x": torch.randn(5000)}, {})
    chunks = HashingChunks(part)
    written = content(chunks)
    assert len(written) == part.num_bytes
    assert chunks.sha256() == hashlib.sha256(written).hexdigest()
    assert torch.equal(load(written)["x"], load(content(HashingChunks(part)))["x"])  # a second try writes the same


def test_what_was_taken_no_longer_follows_training_and_memory_is_used_again(memory):
    weight = torch.ones(1000)
    first = memory.take_tensors({"w": weight}, {})
    weight.fill_(2.0)
    assert load(content(HashingChunks(first)))["w"].eq(1.0).all()
    address = torch.frombuffer(first.data, dtype=torch.uint8).data_ptr()
    smaller = memory.take_tensors({"w": weight[:500]}, {})
    assert torch.frombuffer(smaller.data, dtype=torch.uint8).data_ptr() == address
    assert load(content(HashingChunks(smaller)))["w"].tolist() == [2.0] * 500
