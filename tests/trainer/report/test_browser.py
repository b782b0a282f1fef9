"""The page in a real Chromium, opened as a file: values under the pointer and by keyboard, slider, print, requests."""

from collections.abc import Iterator

import pytest

from tests.trainer.demo.chromium import Browser, chromium
from tests.trainer.report.made import made_run
from trainer.report.command import main

pytestmark = pytest.mark.slow

CURVES = {"loss_g": [(5, 0.5), (10, 0.25), (15, 0.75)], "fid": [(10, 31.5)]}


@pytest.fixture(scope="module")
def opened(tmp_path_factory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("report")
    runs = [made_run(folder / "first", curves=CURVES), made_run(folder / "second", "run.seed=1", curves=CURVES)]
    assert main([*map(str, runs), "--out", str(folder / "report.html")]) == 0
    with chromium(folder / "profile") as browser:
        browser.call("Page.navigate", url=f"file://{folder}/report.html")
        browser.wait("document.readyState === 'complete' && document.querySelectorAll('.chart').length === 2")
        yield browser
        assert browser.faults == []
        addresses = [url for url in browser.requests if not url.startswith("data:")]
        assert addresses == [f"file://{folder}/report.html"]


def values(browser: Browser) -> list[str]:
    return browser.run(
        "[...document.querySelectorAll('[data-chart=\"0\"] output')].map((output) => output.textContent)"
    )


def press(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.call("Input.dispatchKeyEvent", type=kind, key=key)


def shown_step(browser: Browser) -> list[str]:
    shown = "[...document.querySelectorAll('.samples img')].filter((img) => img.checkVisibility())"
    return browser.run(f"{shown}.map((img) => img.dataset.step)")


def test_the_pointer_reads_the_values_of_all_runs(opened: Browser) -> None:
    opened.drag("[data-chart='0'] > svg", (0.55, 0.5), (0.55, 0.5))
    assert values(opened) == ["0.25", "0.25"]
    assert opened.run("document.querySelector('[data-chart=\"0\"] .at').textContent") == "step 10"


def test_the_keyboard_reads_them_too(opened: Browser) -> None:
    opened.run("document.querySelector('[data-chart=\"0\"]').focus()")
    press(opened, "End")
    assert values(opened) == ["0.75", "0.75"]
    press(opened, "Home")
    assert values(opened) == ["0.5", "0.5"]
    press(opened, "ArrowRight")
    assert values(opened) == ["0.25", "0.25"]
    opened.run("document.activeElement.blur()")
    assert values(opened) == ["", ""]
    table = "document.querySelector('figure details tbody').innerText.trim().split(/\\s+/).join(' ')"
    opened.run("document.querySelector('figure details').open = true")
    assert opened.run(table) == "5 0.5 0.5 10 0.25 0.25 15 0.75 0.75"


def test_the_slider_leads_through_the_grids_and_print_shows_the_last(opened: Browser) -> None:
    assert shown_step(opened) == ["15", "15"]
    opened.drag(".samples input", (0.98, 0.5), (0.02, 0.5))
    assert shown_step(opened) == ["5", "15"]
    assert opened.run("document.querySelector('.samples .step').textContent") == "step 5"
    opened.run("window.dispatchEvent(new Event('beforeprint'))")
    assert shown_step(opened) == ["15", "15"]
    opened.run("window.dispatchEvent(new Event('afterprint'))")
    assert shown_step(opened) == ["5", "15"]


def test_dark_and_light_pages_have_readable_colours_and_fit_a_narrow_window(opened: Browser) -> None:
    colours = []
    for scheme in ("light", "dark"):
        opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        colours.append(opened.run("getComputedStyle(document.querySelector('.line.c0')).stroke"))
    assert len(set(colours)) == 2
    opened.call("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=False)
    assert opened.run("document.documentElement.scrollWidth <= window.innerWidth")
