"""No path of the code unpickles or executes what it reads: a scan of the source, with the allowed places."""

import ast
from collections.abc import Iterator

import pytest

from tests.import_graph import python_files

ALLOWED = {
    ("data/formats/cifar10_pickle.py", "pickle"): "an unpickler that refuses every name but those of plain arrays",
    ("trainer/evaluate/networks/features.py", "torch.jit.load"): "a network that the user names; docs/evaluation.md",
}
"""File and what it uses, with the reason."""
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "jsonpickle"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
OBJECTS = {
    "broadcast_object_list",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
}
NAMES = {"os.system", "os.popen", "torch.jit.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}
SAFE_ONLY_WITH = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
LOADERS = {"read_array"}


def uses(source: str) -> Iterator[str]:
    """Everything in a file that can execute what it reads."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in MODULES)
            yield from (alias.name for alias in node.names if alias.name in OBJECTS)
        if isinstance(node, ast.Attribute) and (node.attr in OBJECTS or ast.unparse(node) in NAMES):
            yield node.attr if node.attr in OBJECTS else ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if called in BUILTINS:
            yield called
        if called == "yaml.load" and "SafeLoader" not in ast.unparse(node):
            yield called
        if isinstance(shell := options.get("shell"), ast.expr) and ast.unparse(shell) != "False":
            yield "shell"
        wanted = ("allow_pickle", False) if called.rpartition(".")[2] in LOADERS else SAFE_ONLY_WITH.get(called)
        if wanted and (wanted[0] not in options or ast.unparse(options[wanted[0]]) != str(wanted[1])):
            yield called


def test_nothing_that_is_read_is_unpickled_or_executed() -> None:
    found = {
        (path, use) for path, source in python_files().items() if not path.startswith("tests/") for use in uses(source)
    }
    assert found == set(ALLOWED), "read it as JSON, tensors or arrays; or allow it with a reason"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import dill as d",
        "dist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "np.lib.format.read_array(stream)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "torch.jit.load(file)",
    ],
)
def test_a_dangerous_call_is_found(line: str) -> None:
    assert list(uses(line))


@pytest.mark.parametrize(
    "line",
    [
        "network.eval()",
        "re.compile(text)",
        "yaml.safe_load(text)",
        "torch.load(file, weights_only=True)",
        "np.load(file, allow_pickle=False)",
        "subprocess.run(words)",
        "json.load(file)",
    ],
)
def test_a_harmless_call_is_not(line: str) -> None:
    assert not list(uses(line))
