"""What a launcher prints of a submission holds no secret, whatever its form, and says so."""

import pytest

from cluster.launch import main

SETTINGS = [
    "run.directory=/shared/runs/x",
    "data.path=s3://AKIAEXAMPLE:pa55w0rd@bucket/data",
    "tracking.uri=https://me:pa55w0rd@mlflow.example.org",
    "tracking.uri=https://mlflow.example.org/?token=pa55w0rd",
]


@pytest.mark.parametrize(
    "way",
    [
        ["slurm", "--nodes", "2", "--gpus-per-node", "8"],
        ["ray", "--address", "http://127.0.0.1:9"],
        ["kubernetes", "--nodes", "2", "--gpus-per-node", "8", "--image", "i"],
    ],
    ids=lambda way: way[0],
)
def test_secrets_are_hidden_and_the_rest_is_shown(way: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = [*way, "--config", "lsun256", "--dry-run", "--"]
    assert main([*command, *(word for setting in SETTINGS for word in ("--set", setting))]) == 0
    told = capsys.readouterr()
    assert "pa55w0rd" not in told.out + told.err
    for shown in (
        "run.directory=/shared/runs/x",
        "s3://***@bucket/data",
        "https://***@mlflow.example.org",
        "?token=***",
    ):
        assert shown in told.out
    assert told.err == "*** hides secrets: what is printed cannot be submitted by hand\n"
    assert main([*command, "--set", SETTINGS[0], "--set", "data.path=s3://bucket/data"]) == 0
    assert capsys.readouterr().err == ""
