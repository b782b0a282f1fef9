"""The page in a real Chromium: what a user draws, drags, paints and uploads, and whom the page asks."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from tests.trainer.demo.chromium import Browser, chromium
from tests.trainer.demo.served import TOKEN, Client, served, untrained
from trainer.sample.draw import Loaded, sample_images
from trainer.sample.walk import walk

pytestmark = pytest.mark.slow

IDLE = "document.querySelector('#message').textContent === '' && !document.querySelector('main button:disabled')"


@pytest.fixture(scope="module")
def loaded(tiny) -> Loaded:
    return untrained([*tiny, "data.num_classes=10"])


@pytest.fixture(scope="module")
def page(loaded, tmp_path_factory) -> Iterator[tuple[Browser, Client]]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser, served(loaded) as client:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{client.port}/{TOKEN}/")
        browser.wait(f"document.querySelectorAll('#draw .images canvas').length === 20 && {IDLE}")
        yield browser, client
        own = f"http://127.0.0.1:{client.port}/{TOKEN}/"
        assert [url for url in browser.requests if not url.startswith((own, "data:", "blob:"))] == []
        assert len(browser.requests) > 5


def pixels(browser: Browser, selector: str) -> npt.NDArray[np.uint8]:
    """Of all canvases that a selector finds, [N, H, W, 4]."""
    found = browser.run(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((canvas) => "
        "[...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data])"
    )
    return np.array(found, dtype=np.uint8).reshape(len(found), 8, -1, 4)


def grey(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Images as a canvas has them."""
    rgb = images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1)


def submit(browser: Browser, tab: str, fields: Mapping[str, object]) -> None:
    for name, value in fields.items():
        browser.run(f"document.querySelector('#{tab} [name={name}]').value = {json.dumps(str(value))}")
    browser.click(f"#{tab} form button")
    browser.wait(IDLE)


def open_tab(browser: Browser, number: int) -> None:
    browser.click(f"nav button:nth-child({number})")


def test_the_page_shows_the_samples_of_its_seed_and_class(page, loaded) -> None:
    browser, _ = page
    assert np.array_equal(pixels(browser, "#draw .images canvas"), grey(sample_images(*loaded, num=20, seed=0)))
    submit(browser, "draw", {"seed": 2**62, "num": 3, "class": 4})
    browser.click("#next")
    browser.wait(IDLE)
    wanted = sample_images(*loaded, num=3, seed=2**62 + 1, classes=[4])  # beyond JavaScript's own numbers
    assert np.array_equal(pixels(browser, "#draw .images canvas"), grey(wanted))


def test_the_slider_leads_along_the_walk(page, loaded) -> None:
    browser, _ = page
    open_tab(browser, 2)
    submit(browser, "walk", {"seeds": "1,2", "classes": "3,5", "frames": 9})
    frames = torch.cat(list(walk(*loaded, seeds=[1, 2], num_frames=9, classes=[3, 5], closed=False)))
    assert np.array_equal(pixels(browser, "#frame"), grey(frames[:1]))
    browser.drag("#place", (0.01, 0.5), (0.99, 0.5))
    assert np.array_equal(pixels(browser, "#frame"), grey(frames[-1:]))
    browser.drag("#place", (0.99, 0.5), (0.5, 0.5))
    assert np.array_equal(pixels(browser, "#frame"), grey(frames[4:5]))


def test_a_sample_is_painted_on_and_edited_and_what_is_rubbed_out_is_filled(page) -> None:
    browser, client = page
    open_tab(browser, 1)
    browser.click("#draw .images canvas")
    (sample,) = pixels(browser, "#draw .images canvas:first-child")
    assert np.array_equal(pixels(browser, "#canvas")[0], sample)
    browser.drag("#canvas", (0.06, 0.44), (0.94, 0.44))
    (painted,) = pixels(browser, "#canvas")
    assert (painted[3, 1:7, :3] == 255).all()
    assert np.array_equal(painted[6:], sample[6:])
    submit(browser, "edit", {"seed": 4, "num": 2, "class": 7})
    picture = io.BytesIO()
    Image.fromarray(painted).save(picture, "PNG")
    wanted = client.images("edit", {"way": "stroke", "seed": 4, "num": 2, "class": 7}, picture.getvalue())
    assert np.array_equal(pixels(browser, "#edit .images canvas"), grey(wanted))
    browser.click("[value=rub]")
    assert browser.run("document.querySelector('[name=way]').value") == "mask"
    browser.drag("#canvas", (0.06, 0.06), (0.94, 0.06))
    (rubbed,) = pixels(browser, "#canvas")
    assert (rubbed[0, 1:7, 3] == 0).all() and (rubbed[2:, :, 3] == 255).all()
    submit(browser, "edit", {"num": 4})
    filled = pixels(browser, "#edit .images canvas").astype(int)
    assert np.abs(filled[:, 2:] - painted[2:]).max() <= 1
    assert np.abs(filled[:, :1] - painted[:1]).max() > 1


def test_files_are_chosen_and_dropped_and_a_broken_one_is_told(page, tmp_path: Path) -> None:
    browser, client = page
    open_tab(browser, 3)
    for name, level in (("chosen.png", 50), ("dropped.png", 90)):
        Image.new("L", (30, 20), level).save(tmp_path / name)
    browser.choose_file("#file", tmp_path / "chosen.png")
    browser.wait(IDLE)
    assert (pixels(browser, "#canvas")[0, ..., :3] == 50).all()
    browser.drop("#canvas", tmp_path / "dropped.png")
    browser.wait(
        f"{IDLE} && document.querySelector('#canvas').getContext('2d').getImageData(0, 0, 1, 1).data[0] === 90"
    )
    assert browser.faults == []
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no photograph")
    (tmp_path / "large.png").write_bytes(bytes(client.facts()["max_bytes"] + 1))
    for name, message in (("broken.jpg", "the file is"), ("large.png", "the file is larger than 16 MB")):
        browser.choose_file("#file", tmp_path / name)
        browser.wait(f"document.querySelector('#message.error')?.textContent.startsWith('{message}')")
    assert (pixels(browser, "#canvas")[0, ..., :3] == 90).all()  # as before


def test_nothing_is_offered_that_the_model_cannot_do(page) -> None:
    browser, _ = page
    offered = "[...document.querySelectorAll('[name={}] option')].map((option) => option.value)"
    assert browser.run(offered.format("way")) == ["stroke", "variations", "mask", "upscale"]
    assert browser.run(offered.format("upscale")) == ["2", "4"]
    assert browser.run(offered.format("start")) == ["", "1", "2", "3", "4"]
    assert browser.run("document.querySelector('#edit .label').length") == 10
    with Image.open(io.BytesIO(browser.screenshot())) as picture:
        assert picture.size == (1000, 900)
        assert len(picture.convert("L").getcolors() or ()) > 50


@pytest.mark.parametrize("channels", [1, 5])
def test_a_model_of_pairs_offers_to_translate_alone(tiny, tmp_path: Path, channels: int) -> None:
    loaded = untrained([*tiny, "data.condition_channels=1", f"data.image_channels={channels}"])
    Image.new("L", (8, 8), 90).save(tmp_path / "given.png")
    with served(loaded) as client, chromium(tmp_path / "chromium") as browser:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{client.port}/{TOKEN}/")
        browser.wait(f"document.querySelector('#name')?.textContent && {IDLE}")
        tabs = "[...document.querySelectorAll('nav button')].filter((tab) => tab.offsetParent)"
        assert browser.run(f"{tabs}.map((tab) => tab.textContent)") == ["Translate"]
        browser.choose_file("#input", tmp_path / "given.png")
        browser.wait(f"{IDLE} && document.querySelectorAll('#translate .images canvas').length === 8")
        drawn = pixels(browser, "#translate .images canvas")
        wanted = client.images("translate", {"seed": 0, "num": 7}, (tmp_path / "given.png").read_bytes(), 8 * channels)
        assert np.array_equal(drawn, grey(wanted))
        assert browser.faults == []
