"""Who is answered, with which pixels, and what a form with mistakes is told."""

import asyncio
import io
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.storage.errors import StoppedError
from tests.trainer.demo.served import TOKEN, Client, served, untrained
from trainer.checkpoint.snapshot import save_snapshot
from trainer.demo.server import MAX_BYTES, PAGE, Queue
from trainer.edit import main as edit_command
from trainer.sample.conditions import read_condition, translations
from trainer.sample.draw import Loaded, sample_images
from trainer.sample.walk import walk
from trainer.translate import main as translate_command


@pytest.fixture(scope="module")
def loaded(tiny) -> Loaded:
    return untrained([*tiny, "data.num_classes=10"])


@pytest.fixture(scope="module")
def client(loaded) -> Iterator[Client]:
    with served(loaded) as client:
        yield client


def file_of(image: Image.Image, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8))
PICTURE.putalpha(255)
RUBBED = PICTURE.copy()
RUBBED.paste((0, 0, 0, 0), (0, 0, 8, 4))


@pytest.mark.parametrize("path", ["/", "/model", "/draw", "/page.js", "/index.html", "/no-such-thing", "//"])
@pytest.mark.parametrize("token", ["", "/wrong-token", f"/{TOKEN}x", f"/{TOKEN[:-1]}", "/%ff", f"//{TOKEN}"])
def test_nothing_is_answered_without_the_token(client: Client, path: str, token: str) -> None:
    for method in ("GET", "POST"):
        assert client.ask(token + path, b"" if method == "POST" else None)[0] == 403
    assert client.ask(token + path, headers={"Upgrade": "websocket", "Connection": "Upgrade"})[0] == 403


def test_the_owner_gets_the_page_and_headers_that_keep_it_from_other_hosts(client: Client) -> None:
    for file, kind in (("", "text/html"), ("page.js", "text/javascript"), ("style.css", "text/css")):
        status, content, headers = client.ask(f"/{TOKEN}/{file}")
        assert (status, content) == (200, (PAGE / (file or "index.html")).read_bytes())
        assert headers["content-type"].startswith(kind)
        assert "default-src 'self'" in headers["content-security-policy"]
        assert headers["referrer-policy"] == "no-referrer"
        assert "server" not in headers
    assert client.ask(f"/{TOKEN}/../server.py")[0] in (403, 404)
    assert client.ask(f"/{TOKEN}/%2e%2e/server.py")[0] == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:80"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),  # a port that ssh forwards
    ],
    ids=str,
)
def test_other_hosts_and_pages_are_refused_even_with_the_token(
    client: Client, headers: dict[str, str], status: int
) -> None:
    assert client.ask(f"/{TOKEN}/model", headers=headers)[0] == status
    assert client.ask(f"/{TOKEN}/draw?num=1", b"", headers=headers)[0] == status


def test_samples_are_those_of_trainer_sample(client: Client, loaded: Loaded) -> None:
    drawn = client.images("draw", {"seed": 2**63 - 1, "num": 3, "class": 7})
    assert torch.equal(drawn, sample_images(*loaded, num=3, seed=2**63 - 1, classes=[7]))
    assert torch.equal(client.images("draw", {"seed": 3}), sample_images(*loaded, num=16, seed=3))
    assert len(drawn.unique()) > 20


def test_frames_are_those_of_trainer_walk(client: Client, loaded: Loaded) -> None:
    frames = client.images("walk", {"seeds": "4,9", "classes": "3,5", "frames": 70})
    wanted = walk(*loaded, seeds=[4, 9], num_frames=70, classes=[3, 5], closed=False)
    assert torch.equal(frames, torch.cat(list(wanted)))


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ({"way": "stroke", "start": 2}, ["--stroke", "--start-step", "2"]),
        ({"way": "variations"}, ["--variations"]),
        ({"way": "mask", "resample": 2}, ["--mask", "alpha", "--resample", "2"]),
        ({"way": "upscale", "upscale": 4}, ["--upscale", "4"]),
    ],
    ids=str,
)
def test_edits_are_those_of_trainer_edit(
    client: Client, loaded: Loaded, tmp_path: Path, words: dict[str, Any], options: list[str]
) -> None:
    generator, _, config = loaded
    save_snapshot(tmp_path / "run", generator.state_dict(), config, step=0)
    content = file_of(RUBBED)
    (tmp_path / "a.png").write_bytes(content)
    given = ["--run", str(tmp_path / "run"), "--image", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert edit_command([*given, *options, "--class", "3", "--seed", "5", "--num", "2"]) == 0
    images = client.images("edit", {"seed": 5, "num": 2, "class": 3, **words}, content)
    for number, image in enumerate(images):
        assert np.array_equal(image[0], np.array(Image.open(tmp_path / "out" / f"a-{number}.png")))


def test_translations_are_those_of_trainer_translate(client: Client, tiny, tmp_path: Path) -> None:
    loaded = untrained([*tiny, "data.condition_channels=1"])
    save_snapshot(tmp_path / "run", loaded[0].state_dict(), loaded[2], step=0)
    content = file_of(Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16))
    (tmp_path / "a.png").write_bytes(content)
    given = ["--run", str(tmp_path / "run"), "--input", str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert translate_command([*given, "--seed", "5", "--num", "2"]) == 0
    with served(loaded) as other:
        shown, *images = other.images("translate", {"seed": 5, "num": 2}, content)
        assert other.act("draw", {})[0] == 400
        assert other.facts()["translates"]
    assert torch.equal(shown, read_condition(content, loaded[2])[0])
    for number, image in enumerate(images):
        assert np.array_equal(image[0], np.array(Image.open(tmp_path / "out" / f"a-{number}.png")))
    assert b"cannot translate" in client.act("translate", {}, content)[1]


def test_images_of_five_channels_are_shown_channel_by_channel(tiny) -> None:
    loaded = untrained([*tiny, "data.condition_channels=1", "data.image_channels=5"])
    content = file_of(Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)))
    condition = read_condition(content, loaded[2])
    with torch.no_grad():
        (results,) = translations(loaded, [(condition, None)], num=2, seed=5)
    with served(loaded) as other:
        status, pixels = other.act("translate", {"seed": 5, "num": 2}, content)
        facts = other.facts()
    assert (status, facts["width"], facts["channels"]) == (200, 40, 1)
    shown, *pictures = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(-1, 8, 5, 8)
    assert torch.equal(shown[:, 0], condition[0, 0])
    assert not shown[:, 1:].any()
    for picture, result in zip(pictures, results, strict=True):
        assert torch.equal(picture, result.permute(1, 0, 2))


def test_a_file_comes_back_in_the_form_of_the_model(client: Client) -> None:
    photograph = Image.new("RGB", (60, 20), (200, 10, 10))
    photograph.paste((10, 10, 200), (20, 0, 40, 20))  # the square in the middle
    (prepared,) = client.images("prepare", {}, file_of(photograph, "JPEG"))
    assert prepared.float().mean() == pytest.approx(0.299 * 10 + 0.587 * 10 + 0.114 * 200, abs=3)
    # Once more, as the canvas sends it, it stays.
    again = client.images("prepare", {}, file_of(Image.fromarray(prepared[0].numpy()).convert("RGBA")))
    assert torch.equal(again[0], prepared)


def test_ten_users_at_once_get_their_own_images_and_the_model_serves_one_at_a_time(
    client: Client, loaded: Loaded
) -> None:
    inside, most, lock = 0, 0, Lock()

    def enter(*_: Any) -> None:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)

    def leave(*_: Any) -> None:
        nonlocal inside
        with lock:
            inside -= 1

    handles = [loaded[0].register_forward_pre_hook(enter), loaded[0].register_forward_hook(leave)]
    with ThreadPoolExecutor(10) as users:
        drawn = list(users.map(lambda i: client.images("draw", {"seed": i // 2, "num": 4, "class": i}), range(10)))
    assert most == 1
    for handle in handles:
        handle.remove()
    for i, images in enumerate(drawn):
        assert torch.equal(images, sample_images(*loaded, num=4, seed=i // 2, classes=[i]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is no image of a known format"),
        (b"no image", "the file is no image of a known format"),
        (file_of(PICTURE)[:80], "the file is "),
        (file_of(Image.new("1", (10_000, 6_000))), "the file has 10000x6000 pixels, more than 50000000"),
        (file_of(Image.new("RGBA", (8, 8))), "the file is transparent everywhere"),
    ],
    ids=["nothing", "text", "cut off", "huge", "transparent"],
)
def test_a_file_that_cannot_be_used_is_told_in_words(client: Client, content: bytes, message: str, caplog) -> None:
    for action, words in (("prepare", {}), ("edit", {"way": "mask", "class": 1})):
        status, said = client.act(action, words, content)
        assert (status, said.decode()[: len(message)]) == (400, message)
        assert b"Traceback" not in said
    assert not caplog.records


@pytest.mark.parametrize(
    ("action", "words", "message"),
    [
        ("draw", {"seed": -1}, "seed: '-1' is given, allowed is a whole number of 0 to 9223372036854775807"),
        ("draw", {"seed": 2**63}, "seed: '9223372036854775808' is given"),
        ("draw", {"num": 65}, "num: '65' is given, allowed is a whole number of 1 to 64"),
        ("draw", {"class": 10}, "classes are 10; allowed: 0 to 9"),
        ("draw", {"class": ""}, "class: '' is given"),
        ("walk", {"seeds": "3"}, "a walk needs at least two seeds"),
        ("walk", {"seeds": "0-999999"}, "49 frames are wanted, but 1000000 seeds need one each"),
        ("walk", {"seeds": "0,x"}, "seeds: '0,x' is given, allowed are whole numbers"),
        ("walk", {"classes": "1,2,10"}, "classes are 1, 2, 10; allowed: 0 to 9"),
        ("walk", {"frames": 201}, "frames: '201' is given, allowed is a whole number of 2 to 200"),
        ("edit", {"class": 1}, "way: '' is given, allowed are stroke, variations, mask, colorize, upscale"),
        ("edit", {"way": "stroke"}, "a class is missing: this run has the classes 0 to 9"),
        ("edit", {"way": "stroke", "class": 10}, "the class is 10; allowed: 0 to 9"),
        ("edit", {"way": "stroke", "class": 1, "start": 4}, "noised to step 4 of 4, nothing is left of the image"),
        ("edit", {"way": "mask", "class": 1, "start": 5}, "the start step is 5, but this model has the steps 1 to 4"),
        ("edit", {"way": "mask", "class": 1, "resample": 21}, "resample: '21' is given, allowed is"),
        ("edit", {"way": "mask", "class": 1}, "the file has no transparent parts to fill"),
        ("edit", {"way": "colorize", "class": 1}, "this run draws grey images, and invents no colours"),
        ("edit", {"way": "upscale", "class": 1, "upscale": 3}, "upscale is 3, which does not divide the image size 8"),
        ("edit", {"way": "upscale", "class": 1, "upscale": 16}, "upscale is 16; allowed: 2 to the image size 8"),
    ],
    ids=str,
)
def test_a_mistake_in_a_form_is_told_in_words(
    client: Client, action: str, words: dict[str, Any], message: str, caplog
) -> None:
    status, said = client.act(action, words, file_of(PICTURE))
    assert (status, said.decode()[: len(message)]) == (400, message)
    assert not caplog.records


def test_an_unknown_form_and_another_method_are_refused(client: Client) -> None:
    assert client.act("launch", {})[0] == 404
    assert client.ask(f"/{TOKEN}/draw")[0] == 404
    assert client.ask(f"/{TOKEN}/draw", b"", "DELETE")[0] == 405


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (f"Content-Length: {MAX_BYTES + 1}", 413),
        ("Content-Length: 99999999999999999", 413),
        ("Transfer-Encoding: chunked", 411),
        ("X-None: 1", 411),
        ("Content-Length: -1", 400),
    ],
)
def test_a_body_that_is_too_large_or_of_unknown_length_is_refused_before_it_is_read(
    client: Client, header: str, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as connection:
        connection.sendall(f"POST /{TOKEN}/prepare HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n".encode())
        assert connection.recv(12) == f"HTTP/1.1 {status}".encode()


def test_the_page_is_told_what_the_model_can_do(client: Client) -> None:
    known = {"name": "run", "size": 8, "width": 8, "channels": 1, "classes": 10, "steps": 4, "factors": [2, 4]}
    most = {"num": 64, "frames": 200, "resample": 20}
    assert client.facts() == known | {"translates": False, "most": most, "max_bytes": MAX_BYTES}


def test_the_queue_serves_in_order_until_it_is_stopped() -> None:
    queue, order = Queue(), list[int]()

    def batches(number: int) -> Iterator[torch.Tensor]:
        order.append(number)
        yield torch.full((1, 1, 8, 8), number, dtype=torch.uint8)

    def endless() -> Iterator[torch.Tensor]:
        while True:
            queue.stop()  # as Ctrl-C, at any time
            yield torch.zeros(1, 1, 8, 8, dtype=torch.uint8)

    async def ask() -> list[torch.Tensor]:
        return await asyncio.gather(*(queue.images(batches(number)) for number in range(10)))

    assert [images.unique().tolist() for images in asyncio.run(ask())] == [[number] for number in range(10)]
    assert order == list(range(10))
    for work in (endless(), batches(10)):
        with pytest.raises(StoppedError, match="the server was stopped"):
            asyncio.run(queue.images(work))
    assert 10 not in order
