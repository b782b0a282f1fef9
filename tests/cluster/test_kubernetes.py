"""The RayJob: valid against KubeRay's schema, filled in as asked, and submitted by kubectl."""

import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.kubernetes import submit as kubernetes
from cluster.launch import main
from cluster.request import make_request
from tests.front_door import script
from tests.launch import ROOT

SCHEMA = ROOT.parent / "shared/schemas/rayjob-v1.schema.json"
ON_SHARED = ("--set", "run.directory=/shared/runs/x", "--set", "data.path=s3://bucket/data")


def rendered(*more: str, nodes: int = 2, gpus: int | None = 8, config: str = "lsun256", **options: Any) -> list[Any]:
    request = make_request(config, (*ON_SHARED, *more), nodes=nodes, gpus_per_node=gpus, elsewhere=True)
    settings = {"image": "registry/ddgan:7", "claim": "disk", "secret": None} | options
    return list(yaml.safe_load_all(kubernetes.manifest(request, **settings)))


MANIFESTS = {
    "as it stands": lambda: list(yaml.safe_load_all(kubernetes.MANIFEST.read_text())),
    "gpus": lambda: rendered(),
    "cpus": lambda: rendered(config="digits", gpus=None, secret="keys"),
}


def strict(schema: Any) -> Any:
    """The schema with objects that take their own fields only, and Kubernetes' numbers that may be texts."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(part) for key, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if "properties" in schema and isinstance(schema["properties"], dict) and schema.get("type") == "object":
        found.setdefault("additionalProperties", False)
    return found


@pytest.mark.slow
def test_manifest_is_valid_and_has_no_field_that_kuberay_does_not_know():
    if not SCHEMA.is_file():
        pytest.skip("the schema of KubeRay, shared/schemas next to the checkout, is absent")
    schema = strict(json.loads(SCHEMA.read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    validator = jsonschema.Draft202012Validator(schema)
    for make in MANIFESTS.values():
        job = make()[0]
        validator.validate(job)
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
        head["rayStartParam"] = {}
        with pytest.raises(jsonschema.ValidationError, match="rayStartParam"):
            validator.validate(job)
        del head["rayStartParam"]
        head["template"]["spec"]["containers"][0]["image"] = 7
        with pytest.raises(jsonschema.ValidationError, match="7 is not of type 'string'"):
            validator.validate(job)


# What KubeRay 1.6 takes, of what we use; the schema itself is not part of this project.
FIELDS = {
    "spec": "entrypoint suspend backoffLimit shutdownAfterJobFinishes ttlSecondsAfterFinished submissionMode "
    "submitterConfig rayClusterSpec",
    "spec.rayClusterSpec": "rayVersion authOptions headGroupSpec workerGroupSpecs",
    "spec.rayClusterSpec.headGroupSpec": "serviceType rayStartParams template",
    "spec.rayClusterSpec.workerGroupSpecs.0": "groupName replicas minReplicas maxReplicas rayStartParams template",
    "spec.rayClusterSpec.workerGroupSpecs.0.template.spec": "automountServiceAccountToken "
    "terminationGracePeriodSeconds securityContext containers volumes",
    "spec.rayClusterSpec.headGroupSpec.template.spec.containers.0": "name image env envFrom lifecycle readinessProbe "
    "livenessProbe ports resources securityContext volumeMounts",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifest_has_known_fields_only(name):
    job = MANIFESTS[name]()[0]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    for path, fields in FIELDS.items():
        found = job
        for step in path.split("."):
            found = found[int(step)] if step.isdigit() else found[step]
        assert set(found) <= set(fields.split()), path


def test_what_is_asked_for_stands_in_the_manifest():
    job, policy = rendered("--set", "scaling.min_world_size=4", gpus=4, secret="keys")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], workers["maxReplicas"]) == (2, 1, 2)
    (container,) = workers["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"] == {"cpu": "4", "memory": "128Gi", "nvidia.com/gpu": "4"}
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:6] == ["python", "-m", "cluster.launch", "train", "--config", "lsun256"]
    assert words[6:] == [*ON_SHARED, "--set", "scaling.min_world_size=4"]  # 8 ranks are the config's own number
    name = job["metadata"]["name"]
    for group in (cluster["headGroupSpec"], workers):
        template = group["template"]
        assert template["metadata"]["labels"]["ddgan/run"] == name
        assert template["spec"]["containers"][0]["image"] == "registry/ddgan:7"
        assert template["spec"]["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
        assert template["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "disk"}
    assert policy["metadata"]["name"] == name
    assert policy["spec"]["podSelector"] == {"matchLabels": {"ddgan/run": name}}


def test_ray_version_is_that_of_the_lock():
    lock = (ROOT / "requirements.lock").read_text()
    version = yaml.safe_load(kubernetes.MANIFEST.read_text().split("\n---")[0])["spec"]["rayClusterSpec"]["rayVersion"]
    assert f"\nray=={version}\n" in lock


# ---- kubectl ----

KUBECTL = """#!/bin/bash
echo "$*" >>"$CALLS"
case "$1" in
    get) [[ "$*" != *jsonpath* ]] || printf '%s' "$STATUS" ;;
    apply) cat >>"$CALLS.stdin" ;;
esac
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch) -> Path:
    """A stand-in that records: there is no Kubernetes here."""
    script(tmp_path / "kubectl", KUBECTL)
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("STATUS", "")
    monkeypatch.setattr("cluster.record.FOLDER", tmp_path / "launches")
    return calls


COMMAND = ["kubernetes", "--config", "lsun256", "--image", "i", "--nodes", "2", "--gpus-per-node", "8"]


def test_what_is_printed_is_what_kubectl_gets(kubectl, capsys):
    assert main([*COMMAND, "--dry-run", "--", *ON_SHARED]) == 0
    printed = capsys.readouterr().out
    assert kubectl.read_text() == ""
    assert main([*COMMAND, "--namespace", "mine", "--", *ON_SHARED]) == 0
    assert kubectl.with_name("calls.stdin").read_text() == printed
    assert kubectl.read_text().splitlines()[-1] == "apply --namespace mine --filename -"


def test_a_submission_that_cannot_be_recorded_is_told_with_its_job(kubectl, tmp_path, capsys):
    (tmp_path / "launches").touch()  # in the way of the folder, as a read-only disk would be
    assert main([*COMMAND, "--", *ON_SHARED]) == 0
    assert "apply" in kubectl.read_text()
    told = capsys.readouterr().err
    assert f"submitted as job {rendered()[0]['metadata']['name']}; run x" in told
    assert (
        f"this start is not recorded ({tmp_path}/launches: File exists); status, logs and stop do not know it" in told
    )
    assert "./launch.sh status" not in told


def test_a_run_under_way_is_left_alone_and_one_that_is_over_made_anew(kubectl, capsys, monkeypatch):
    monkeypatch.setenv("STATUS", "x-1b24dc Running")
    assert main([*COMMAND, "--", *ON_SHARED]) == 1
    assert "is still active (Running): stop it with ./launch.sh stop" in capsys.readouterr().err
    assert "apply" not in kubectl.read_text()
    monkeypatch.setenv("STATUS", "x-1b24dc Failed")
    assert main([*COMMAND, "--", *ON_SHARED]) == 0
    assert [line.split()[0] for line in kubectl.read_text().splitlines()][-2:] == ["delete", "apply"]


def test_status_logs_and_stop_go_to_the_job(kubectl):
    assert main([*COMMAND, "--namespace", "mine", "--", *ON_SHARED]) == 0
    kubectl.write_text("")
    for command in (["status", "/shared/runs/x"], ["logs", "-f", "x"], ["stop", "/shared/runs/x"]):
        assert main(command) == 0
    status, logs, stop = kubectl.read_text().splitlines()
    assert status.startswith("get rayjob/x-") and "--namespace mine" in status
    assert logs.startswith("logs --selector job-name=x-") and logs.endswith("--follow")
    assert stop.endswith('--patch {"spec": {"suspend": true}}')


def test_without_kubectl_nothing_is_recorded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("cluster.record.FOLDER", tmp_path / "launches")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*COMMAND, "--", *ON_SHARED]) == 1
    assert "there is no kubectl on this machine" in capsys.readouterr().err
    assert not (tmp_path / "launches").exists()
