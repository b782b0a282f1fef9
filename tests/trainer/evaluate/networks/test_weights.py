"""Weights by their hash: found under any name, fetched once, converted; and what is told where they are not there."""

import hashlib
import io
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from data.storage.errors import UserError
from trainer.evaluate.networks.weights import PinnedWeights, convert_weights, find_weights, load_network

STATE = {"0.weight": torch.arange(6.0).view(2, 3), "0.bias": torch.tensor([7.0, 8.0])}
NORM = {name: torch.ones(2) for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var")}
COUNTED = {"1.num_batches_tracked": torch.tensor(3)}


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def stored(state: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


CONTENT = stored(STATE | NORM | COUNTED)
PINNED = PinnedWeights(
    network="inception",
    url="memory://weights/made.pth",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of weights, still missing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache" / "ddgan" / "networks"


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch):
    """The place where the weights are published; returns how to put a file there."""
    memory = fsspec.filesystem("memory")
    yield lambda content: memory.pipe("/weights/made.pth", content)
    memory.rm("/weights", recursive=True)


@pytest.mark.parametrize("place", ["cache/ddgan/networks", "torch/hub/checkpoints"])
def test_weights_are_found_by_their_hash_under_any_name_where_fid_programs_keep_them(
    place: str, tmp_path: Path
) -> None:
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "a.pth").write_bytes(bytes(len(CONTENT)))
    (tmp_path / place / "b.pth").write_bytes(CONTENT)
    found = find_weights(PINNED)
    assert found.sha256 == PINNED.sha256
    network = load_network(build, found, "cpu")
    assert torch.equal(network.state_dict()["0.weight"], STATE["0.weight"])
    assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_weights_are_fetched_once(published, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published(CONTENT)
    assert find_weights(PINNED).sha256 == PINNED.sha256
    assert "fetching 0.0 MB from memory://weights/made.pth" in capsys.readouterr().err
    published(b"gone")
    assert torch.equal(find_weights(PINNED).state["0.bias"], STATE["0.bias"])
    assert capsys.readouterr().err == "" and (folder / "made.pth").read_bytes() == CONTENT


def test_another_file_at_the_place_is_refused_and_not_kept(published, folder: Path) -> None:
    published(stored(STATE))
    with pytest.raises(UserError, match=r"made\.pth has the SHA-256 .*, which is not that of the published file"):
        find_weights(PINNED)
    assert [file.name for file in folder.iterdir()] == [".lock"]


def test_without_a_network_one_message_says_which_file_belongs_where(folder: Path) -> None:
    url = "http://127.0.0.1:9/place/made.pth"  # nothing listens there
    with pytest.raises(UserError) as caught:
        find_weights(PinnedWeights(network="inception", url=url, num_bytes=95_628_359, sha256="6726825d"))
    told = str(caught.value)
    assert "\n" not in told and "could not be fetched: the connection was refused; check the address" in told
    assert f"Put {url} (95.6 MB, SHA-256 6726825d) into {folder}; " in told
    assert "python -m trainer.evaluate --convert FILE --network inception" in told


def test_a_damaged_file_is_named_with_both_hashes(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "made.pth").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=rf"has the SHA-256 .*, expected is {PINNED.sha256}: it is damaged .*--convert"):
        find_weights(PINNED)


def test_converted_weights_are_taken_with_the_hash_of_their_source(tmp_path: Path) -> None:
    file = tmp_path / "again.safetensors"
    # Half precision, without what only training needs, and with some that our network does not have.
    save_file({name: value.half() for name, value in (STATE | NORM).items()} | {"mask_token": torch.zeros(1)}, file)
    sha256 = convert_weights(file, PINNED, build)
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest() != PINNED.sha256
    found = find_weights(PINNED)
    assert found.sha256 == sha256
    network = load_network(build, found, "cpu")
    # The sums of the rows and the bias; normalizing by ones leaves them as they are, but for the epsilon.
    torch.testing.assert_close(network(torch.ones(1, 3)), torch.tensor([[10.0, 20.0]]), rtol=1e-4, atol=0)


def test_the_published_file_stays_itself_when_it_is_converted(tmp_path: Path) -> None:
    (tmp_path / "made.pth").write_bytes(CONTENT)
    assert convert_weights(tmp_path / "made.pth", PINNED, build) == PINNED.sha256
    assert find_weights(PINNED).sha256 == PINNED.sha256


@pytest.mark.parametrize(
    ("state", "told"),
    [
        (STATE, r"1\.bias is missing: these are other weights"),
        (STATE | NORM | {"2.bias": torch.zeros(2)}, r"2\.bias is unknown"),
        (STATE | NORM | {"0.bias": torch.zeros(3)}, r"0\.bias is \[3\], expected is \[2\]"),
    ],
)
def test_weights_of_another_network_are_refused_by_the_name_that_differs(
    state: dict[str, Tensor], told: str, tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "other.pth").write_bytes(stored(state))
    with pytest.raises(UserError, match=told):
        convert_weights(tmp_path / "other.pth", PINNED, build)
    assert not folder.exists()
