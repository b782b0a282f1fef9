"""The launch specs open nothing to strangers: no public address, no Ray without a token, no secret for other eyes."""

import re
from collections.abc import Iterator

import pytest
import yaml

from tests.launch import ROOT

SPECS = (
    "cluster/**/*.yaml",
    "cluster/**/*.sbatch",
    "cluster/**/*.py",
    "launch.sh",
    "trainer/**/*.py",
    "docs/*.md",
    "README.md",
)

PUBLIC = re.compile(
    r"(?<![\d.])0\.0\.0\.0(?![\d.])|host[=: ]+[\"']?(?:\[?::\]?|\*)[\"' ]"
    r"|\b(?:hostNetwork|hostPort|LoadBalancer|NodePort)\b|enableIngress"
)
SECRET = re.compile(
    # A pinned digest, NAME_SHA256 = "...", is none.
    r"(?i)(?<!_sha256 = \")\b[0-9a-f]{64}\b|AKIA[0-9A-Z]{16}"
    r"|(?:token|password|secret)\s*[:=]\s*[\"'][^\"'${}<]{12,}[\"']"
)
LOOSE = re.compile(
    r"chmod (?:-R )?(?:[0-7]?[0-7][4-7][0-7]|[0-7]?[0-7][0-7][4-7]|[augo]*o[augo]*\+|a\+)|defaultMode: 0?[0-7]*[4-7]\b"
)


def problems(path: str, text: str) -> Iterator[str]:
    """What is wrong in a spec, each with its line."""
    for number, line in enumerate(text.splitlines(), 1):
        said = line.split("#", 1)[0] if path.endswith((".yaml", ".sbatch")) else line
        where = f"{path}:{number}"
        if PUBLIC.search(said) and not path.endswith(".md"):
            yield f"{where}: listens for everybody: {line.strip()}"
        if SECRET.search(said):
            yield f"{where}: looks like a secret: {line.strip()}"
        if LOOSE.search(said):
            yield f"{where}: readable by others: {line.strip()}"
        if path.endswith((".yaml", ".sbatch")) and re.search(r"\bray start\b", said):
            if "RAY_AUTH_MODE=token" not in said:
                yield f"{where}: Ray without a token: {line.strip()}"
            if "--head" in said and "--dashboard-host=" not in said:
                yield f"{where}: a dashboard without an address of its own: {line.strip()}"
    if path.endswith(".sbatch") and "token" in text:
        first = text.index("/token")
        if "umask 077" not in text[:first] or "mkdir -m 700" not in text[:first]:
            yield f"{path}: writes a token before umask 077 and a folder of mode 700"
    if path.endswith(".yaml"):
        yield from (f"{path}: {words}" for document in yaml.safe_load_all(text) for words in of_document(document))


def of_document(document: object) -> Iterator[str]:
    """What is wrong in a manifest of Kubernetes, or a config of the autoscaler."""
    if not isinstance(document, dict):
        return
    if document.get("kind") == "RayJob":
        cluster = document["spec"]["rayClusterSpec"]
        if cluster.get("authOptions", {}).get("mode") != "token":
            yield "RayJob without authOptions mode token"
        head = cluster["headGroupSpec"]
        if head["rayStartParams"].get("dashboard-host") not in ("127.0.0.1", "$POD_IP"):
            yield "the dashboard listens elsewhere than on the pod's own address"
        if head.get("serviceType") != "ClusterIP":
            yield "the head's service is not ClusterIP"
        for group in (head, *cluster["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            if pod.get("automountServiceAccountToken") is not False:
                yield "pods hold a token of the Kubernetes API"
            if not pod.get("securityContext", {}).get("runAsNonRoot"):
                yield "pods may run as root"
    if "cluster_name" in document and "~/.ray/auth_token" in document.get("file_mounts", {}):
        if "chmod 600 ~/.ray/auth_token" not in document.get("setup_commands", []):
            yield "the token is copied without chmod 600"
    elif "cluster_name" in document:
        yield "the cluster's machines get no token"


def specs() -> dict[str, str]:
    files = (file for pattern in SPECS for file in ROOT.glob(pattern))
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def test_no_spec_opens_anything_to_strangers():
    found = [words for path, text in specs().items() for words in problems(path, text)]
    assert not found, "\n".join(found)


def test_the_scan_sees_every_spec():
    wanted = {"cluster/slurm/job.sbatch", "cluster/ray/cluster.yaml", "cluster/kubernetes/rayjob.yaml", "launch.sh"}
    assert wanted | {"cluster/ray/runtime_env.yaml", "cluster/slurm/ray_node.py", "trainer/driver/ray_train.py"} <= {
        *specs()
    }


@pytest.mark.parametrize(
    ("path", "before", "after", "words"),
    [
        (
            "cluster/kubernetes/rayjob.yaml",
            "dashboard-host: $POD_IP",
            'dashboard-host: "0.0.0.0"',
            "listens for everybody",
        ),
        (
            "cluster/kubernetes/rayjob.yaml",
            "authOptions: {mode: token}",
            "authOptions: {mode: disabled}",
            "without authOptions",
        ),
        ("cluster/kubernetes/rayjob.yaml", "serviceType: ClusterIP", "serviceType: NodePort", "listens for everybody"),
        (
            "cluster/kubernetes/rayjob.yaml",
            "automountServiceAccountToken: false",
            "automountServiceAccountToken: true",
            "API",
        ),
        ("cluster/ray/cluster.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listens for everybody"),
        ("cluster/ray/cluster.yaml", " --dashboard-host=127.0.0.1", "", "a dashboard without an address"),
        ("cluster/ray/cluster.yaml", "RAY_AUTH_MODE=token RAY_USAGE", "RAY_USAGE", "Ray without a token"),
        ("cluster/ray/cluster.yaml", "chmod 600", "chmod 644", "readable by others"),
        ("cluster/ray/cluster.yaml", "  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "get no token"),
        (
            "cluster/ray/runtime_env.yaml",
            "env_vars:",
            "env_vars:\n  RAY_AUTH_TOKEN: " + "ab" * 32,
            "looks like a secret",
        ),
        ("cluster/slurm/job.sbatch", "umask 077", "umask 022", "writes a token before umask 077"),
        ("cluster/slurm/job.sbatch", "mkdir -m 700", "mkdir", "writes a token before umask 077"),
        ("cluster/slurm/ray_node.py", "{self.address}", "0.0.0.0", "listens for everybody"),
    ],
)
def test_a_spec_that_opens_something_is_found(path, before, after, words):
    text = (ROOT / path).read_text()
    assert before in text
    found = list(problems(path, text.replace(before, after)))
    assert any(words in line for line in found), found
