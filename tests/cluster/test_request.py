"""What a launcher is asked for is checked before anything is submitted."""

import re

import pytest

from cluster.request import make_request, name_of
from trainer.config.draft import ConfigError

ON_SHARED = ("--set", "run.directory=/shared/runs/x", "--set", "data.path=/shared/data")


def test_ranks_are_nodes_times_gpus():
    request = make_request("lsun256", ON_SHARED, nodes=2, gpus_per_node=4, elsewhere=True)
    assert request.config.scaling.world_size == 8
    assert request.arguments == ("--config", "lsun256", *ON_SHARED)  # it is the config's own number
    wider = make_request("lsun256", ON_SHARED, nodes=2, gpus_per_node=8, elsewhere=True)
    assert wider.config.scaling.world_size == 16
    assert wider.arguments[-2:] == ("--set", "scaling.world_size=16")
    assert wider.cpus_per_node == 8


def test_a_preset_is_chosen_where_the_run_starts():
    preset = ("--gpus", "1", "--gpu-memory", "24", *ON_SHARED)
    request = make_request("cifar10", preset, nodes=1, gpus_per_node=1, elsewhere=True)
    assert (request.config.scaling.world_size, request.config.training.micro_batch_size) == (1, 256)
    assert request.arguments == ("--config", "cifar10", *preset)


def test_ranks_on_cpus_are_the_configs_spread_over_the_nodes():
    request = make_request("digits", (), nodes=2, gpus_per_node=None, elsewhere=False)
    assert (request.config.scaling.world_size, request.gpus_per_node, request.cpus_per_node) == (2, 0, 1)


@pytest.mark.parametrize(
    ("config", "more", "options", "words"),
    [
        ("digitz", (), {"nodes": 2, "gpus_per_node": None}, "digits"),
        ("lsun256", (), {"nodes": 2, "gpus_per_node": None}, "--gpus-per-node is missing, but scaling.device is gpu"),
        ("lsun256", (), {"nodes": 2, "gpus_per_node": 0}, "give 1 or more, or -- --set scaling.device=cpu"),
        ("digits", (), {"nodes": 2, "gpus_per_node": 8}, "--gpus-per-node is 8, but scaling.device is cpu: give 0"),
        ("lsun256", (), {"nodes": 4, "gpus_per_node": 8}, "Use a world size of at most 16"),
        (
            "lsun256",
            ("--set", "scaling.world_size=4"),
            {"nodes": 2, "gpus_per_node": 4},
            "scaling.world_size is 4, but 2 nodes with 4 GPUs make 8 ranks: omit that --set",
        ),
        (
            "lsun256",
            ("--gpus", "1", "--gpu-memory", "24"),
            {"nodes": 2, "gpus_per_node": 4},
            "--gpus is 1, but 2 nodes with 4 GPUs make 8: omit --gpus",
        ),
        ("digits", ("--dry-run",), {"nodes": 1, "gpus_per_node": None}, "--dry-run is given after --"),
    ],
)
def test_what_does_not_fit_is_named(config, more, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        make_request(config, more, elsewhere=False, **options)


def test_a_run_elsewhere_needs_paths_that_mean_something_there(tmp_path):
    with pytest.raises(ConfigError, match=r"run.directory is runs/lsun256, a relative path"):
        make_request("lsun256", (), nodes=None, gpus_per_node=None, elsewhere=True)
    mine = tmp_path / "mine.yaml"
    mine.write_text("")
    with pytest.raises(ConfigError, match=r"line|empty|run"):
        make_request(str(mine), ON_SHARED, nodes=None, gpus_per_node=None, elsewhere=True)


def test_a_config_file_outside_the_checkout_does_not_travel(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text((make_request.__globals__["ROOT"] / "trainer/configs/digits.yaml").read_text())
    with pytest.raises(ConfigError, match=f"--config is {mine}, but only files in .* are sent to the cluster"):
        make_request(str(mine), ON_SHARED, nodes=None, gpus_per_node=None, elsewhere=True)


@pytest.mark.parametrize("directory", ["/shared/runs/My Run_3", "/x/2024", "/x/" + "long" * 30, "runs/digits", "/x/__"])
def test_a_name_fits_kubernetes_and_is_the_directorys_alone(directory):
    name = name_of(directory)
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40
    assert name_of(directory) == name != name_of(directory + "2")
