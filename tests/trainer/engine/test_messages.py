"""What ranks send to one another, and that none of it is executed."""

import json
import pickle

import pytest
import torch

from trainer.engine.messages import decode, encode


@pytest.mark.parametrize(
    "value",
    [None, "", "ü", [1, 2.5e-17, True, None], {"a": {"b": []}}, float("inf"), 2**80, [], {"loss": 0.1 + 0.2}],
    ids=repr,
)
def test_a_value_arrives_as_it_was(value: object) -> None:
    assert decode(encode(value)) == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 2), (2, 0, 4)])
def test_a_tensor_arrives_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.rand(shape) * 3).to(dtype)
    name, (received, last) = decode(encode(("x", (sent, torch.arange(3).flip(0)))))
    assert (name, received.dtype, received.shape) == ("x", dtype, sent.shape)
    assert torch.equal(received, sent) and last.tolist() == [2, 1, 0]


def test_a_strided_tensor_and_not_a_number_arrive() -> None:
    sent = torch.tensor([[float("nan"), 1.0], [2.0, -0.0]]).T
    received = decode(encode(sent))
    assert received.contiguous().view(torch.int32).tolist() == sent.contiguous().view(torch.int32).tolist()


def test_other_objects_are_refused_by_the_sender() -> None:
    with pytest.raises(TypeError, match="ranks cannot send a set"):
        encode({"x": {1}})


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


def raw(content: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize(
    "text",
    [
        pickle.dumps(Evil()),
        json.dumps({"__tensor__": ["load", [1]]}).encode(),
        json.dumps({"__tensor__": ["float32", [8]]}).encode(),
        b"",
    ],
    ids=["pickle", "function", "short", "empty"],
)
def test_what_a_stranger_sends_is_not_executed(text: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        decode(raw(len(text).to_bytes(8, "little") + text))
    assert capsys.readouterr().out == ""
