"""Curves as Prometheus gauges, and the dashboard that shows them."""

import json
import re

from tests.launch import ROOT
from tests.trainer.runs import Stopper, configure, train
from trainer.driver.gauges import GAUGES, TAGS, gauges_of


def test_curves_of_a_node_and_of_a_gpu_are_told_apart_by_labels():
    curves = {"system/node-1/cpu_percent": 3.0, "system/node-0/gpu-12/power_watts": 250.0, "loss_g": 0.5, "lr": 1.0}
    assert list(gauges_of(curves, "mine")) == [
        ("ddgan_node_cpu_percent", {"run": "mine", "node": "1", "gpu": ""}, 3.0),
        ("ddgan_gpu_power_watts", {"run": "mine", "node": "0", "gpu": "12"}, 250.0),
        ("ddgan_loss_g", {"run": "mine", "node": "", "gpu": ""}, 0.5),
    ]


def test_a_run_shows_every_gauge_that_needs_no_gpu(tiny, tmp_path):
    driver = Stopper()
    train(configure(tiny, tmp_path / "run"), driver)
    assert len(driver.shown) >= 2
    for curves in driver.shown:
        shown = {name: tags for name, tags, _ in gauges_of(curves, "mine")}
        assert shown.keys() == {name for name in GAUGES if not name.startswith("ddgan_gpu_")}
        assert all(tags.keys() == set(TAGS) for tags in shown.values())


def test_dashboard_shows_every_gauge_and_no_other():
    dashboard = (ROOT / "cluster/ray/grafana.json").read_text()
    assert set(re.findall(r"\bray_\w+", dashboard)) == {f"ray_{name}" for name in GAUGES}
    panels = json.loads(dashboard)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len(panels)
