"""Makes a RayJob from a request, for `./launch.sh kubernetes`; submits it, follows it and stops it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.commands import ToolError, run_tool, show_tool
from cluster.record import Record
from cluster.request import Request

MANIFEST = Path(__file__).parent / "rayjob.yaml"
MEMORY_PER_RANK_GI = 32
_OVER = ("Complete", "Failed", "Suspended")


def manifest(request: Request, *, image: str, claim: str, secret: str | None) -> str:
    """The documents for kubectl.

    Args:
        request: the request; its nodes become workers.
        image: container image with the project and its packages.
        claim: claim of the volume that is mounted at /shared.
        secret: Secret whose keys become environment variables, such as AWS_ACCESS_KEY_ID; None: no Secret.
    """
    job, policy = yaml.safe_load_all(MANIFEST.read_text())
    for document in (job, policy):
        document["metadata"]["name"] = request.name
        document["metadata"]["labels"]["ddgan/run"] = request.name
    peers = policy["spec"]["ingress"][0]["from"]
    policy["spec"]["podSelector"]["matchLabels"]["ddgan/run"] = request.name
    peers[0]["podSelector"]["matchLabels"]["ddgan/run"] = request.name
    peers[1]["podSelector"]["matchLabels"]["job-name"] = request.name
    job["spec"]["entrypoint"] = request.entrypoint
    cluster = job["spec"]["rayClusterSpec"]
    workers = cluster["workerGroupSpecs"][0]
    fewest = request.config.scaling.min_world_size
    per_node = request.gpus_per_node or request.cpus_per_node // request.config.scaling.cpus_per_worker
    workers |= {
        "replicas": request.nodes,
        "minReplicas": request.nodes if fewest is None else -(-fewest // per_node),
        "maxReplicas": request.nodes,
    }
    for group in (cluster["headGroupSpec"], workers):
        template = group["template"]
        template["metadata"]["labels"]["ddgan/run"] = request.name
        (container,) = template["spec"]["containers"]
        container["image"] = image
        if secret:
            container["envFrom"] = [{"secretRef": {"name": secret}}]
        template["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"] = claim
    (container,) = workers["template"]["spec"]["containers"]
    container["resources"] = _resources(request)
    return yaml.safe_dump_all([job, policy], sort_keys=False, width=1000)


def _resources(request: Request) -> dict[str, Any]:
    given = {"cpu": str(request.cpus_per_node), "memory": "8Gi"}
    if request.gpus_per_node:
        given["memory"] = f"{MEMORY_PER_RANK_GI * request.gpus_per_node}Gi"
        given["nvidia.com/gpu"] = str(request.gpus_per_node)
    return {"limits": given, "requests": dict(given)}


def submit(request: Request, documents: str, namespace: str) -> Record:
    """Submit the job to the cluster that kubectl is configured for.

    Raises:
        ToolError: kubectl is missing or failed, or the run is still active.
    """
    place = ["--namespace", namespace]
    status = _status(request.name, place)
    if status and status not in _OVER:
        raise ToolError(f"{request.name} is still active ({status}): stop it with ./launch.sh stop {request.name}")
    if status:  # a RayJob that is over does not restart when it is applied again
        run_tool(["kubectl", "delete", "rayjob", request.name, *place, "--wait=true"])
    run_tool(["kubectl", "apply", *place, "--filename", "-"], stdin=documents)
    return Record(request.name, "kubernetes", request.config.run.directory, request.name, place=namespace)


def status(record: Record) -> int:
    """Show the job's status."""
    place = ["--namespace", record.place]
    return show_tool(["kubectl", "get", f"rayjob/{record.job}", *place, "--output", "wide"])


def logs(record: Record, follow: bool) -> int:
    """Show the driver's output, which the submitter pod repeats."""
    more = ["--follow"] if follow else []
    place = ["--namespace", record.place]
    return show_tool(["kubectl", "logs", "--selector", f"job-name={record.job}", "--tail=-1", *place, *more])


def stop(record: Record) -> int:
    """Save and exit: suspending a RayJob deletes its pods, and the head's preStop asks the driver to save first."""
    patch = json.dumps({"spec": {"suspend": True}})
    place = ["--namespace", record.place]
    return show_tool(["kubectl", "patch", f"rayjob/{record.job}", *place, "--type", "merge", "--patch", patch])


def _status(name: str, place: Sequence[str]) -> str:
    """The status of a RayJob according to KubeRay; empty if there is none with that name."""
    command = ["kubectl", "get", f"rayjob/{name}", *place, "--ignore-not-found"]
    return (
        run_tool([*command, "--output", "jsonpath={.metadata.name} {.status.jobDeploymentStatus}"]).partition(" ")[2]
        or ""
    )
