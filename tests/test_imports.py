"""The shape of the code, read off its source: imports go one way, and a few things stand in one place only.

api -> engine.client -> engine -> adapters -> adapters_store
"""

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path for package in ("server", "adapters_store") for path in (ROOT / package).rglob("*.py"))

# Vocabulary: what everything in server may import, and what imports nothing but vocabulary.
LEAVES = {
    "server.errors",
    "server.settings",
    "server.adapters.sites",
    "server.engine.messages",
    "server.metrics.names",
}
# The processes' frames: they import what they like.
FRAMES = {"server.app", "server.api.__main__", "server.cli"}
# Of each room (the longest prefix counts), the other rooms it may import beside the leaves.
ROOMS: dict[str, set[str]] = {
    "adapters_store": {"server.errors"},
    "server": set(),  # __init__: the version
    "server.errors": set(),
    "server.settings": set(),
    "server.adapters.sites": set(),
    "server.engine.messages": set(),
    "server.logs": set(),
    "server.lifeline": {"server.logs"},
    "server.build": {"server"},
    "server.memory": set(),
    "server.metrics.names": set(),
    "server.metrics": {"server.build", "server.memory"},
    "server.tracing": set(),
    "server.base": set(),
    "server.kernels": set(),
    "server.adapters": {"adapters_store", "server.kernels"},
    "server.engine": {
        "server.adapters",
        "adapters_store",
        "server.kernels",
        "server.base",
        "server.lifeline",
        "server.memory",
    },
    "server.engine.client": set(),
    "server.tenancy": {"adapters_store"},
    # what the API may know of training, each a room of its own
    "server.finetune.recipe": {"server.adapters", "server.finetune"},
    "server.finetune.dataset": {"server.base", "server.finetune"},
    "server.finetune.files": {"adapters_store", "server.tenancy", "server.finetune"},
    "server.finetune.uploads": {"adapters_store", "server.finetune", "server.finetune.files"},
    "server.finetune.job": {"adapters_store", "server.finetune.recipe"},
    "server.finetune.jobs": {"adapters_store", "server.finetune", "server.finetune.job"},
    "server.finetune.queue": {"adapters_store"},
    "server.finetune.figures": {"adapters_store", "server.finetune"},
    "server.finetune.store_calls": {"server.metrics"},
    "server.finetune.tally": {
        "server.build",
        "server.memory",
        "server.metrics",
        "server.finetune.store_calls",
    },
    "server.finetune": {
        "adapters_store",
        "server.adapters",
        "server.base",
        "server.engine",
        "server.finetune.dataset",
        "server.finetune.figures",
        "server.finetune.files",
        "server.finetune.job",
        "server.finetune.jobs",
        "server.finetune.queue",
        "server.finetune.recipe",
        "server.finetune.store_calls",
        "server.finetune.tally",
        "server.kernels",
        "server.lifeline",
        "server.tenancy",
    },
    "server.api": {
        "server.base",
        "server.engine.client",
        "server.adapters",
        "adapters_store",
        "server.tenancy",
        "server.logs",
        "server.metrics",
        "server.tracing",
        "server.finetune.figures",
        "server.finetune.recipe",
        "server.finetune.dataset",
        "server.finetune.files",
        "server.finetune.uploads",
        "server.finetune.job",
        "server.finetune.jobs",
        "server.finetune.queue",
    },
    "server.supervisor": {"server.lifeline", "server.logs"},
}
NO_TORCH = {
    "server.engine.scheduler",
    "server.engine.kv",
    "server.engine.footprint",
    "server.engine.row",
    "server.adapters.cache",
    "server.errors",
    "server.settings",
    "server.adapters.sites",
    "server.engine.messages",
    "server.engine.client",
    "server.supervisor.system",
    "server.cli",
    "server.finetune.recipe",
    "server.finetune.files",
    "server.finetune.uploads",
    "server.finetune.jobs",
    "server.finetune.queue",
    "server.finetune.publisher",
    "server.finetune.figures",
    "server.finetune.tally",
    "server.tracing",
    "server.metrics",
    "adapters_store.registry",
}
WITH_TORCH = ["triton"]  # comes with its CUDA build, and is imported only where kernels/gpu.py says so
MAX_LINES, MAX_FUNCTION_LINES = 300, 60


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@cache
def imports(module: str) -> frozenset[str]:
    """Every module imported anywhere in the source, ours by their full names, others by their first part."""
    found: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return frozenset(name if name in MODULES else name.partition(".")[0] for name in found)


def reached(module: str) -> set[str]:
    """All that importing `module` imports, through our own modules."""
    found, ahead = {module}, [module]
    while ahead:
        new = imports(ahead.pop()) - found
        found |= new
        ahead += new & MODULES.keys()
    return found


def room_of(module: str) -> str:
    return max((room for room in {*ROOMS, *FRAMES} if f"{module}.".startswith(f"{room}.")), key=len)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    room = room_of(module)
    if room in FRAMES:
        return
    allowed = ROOMS[room] | {room} | (set() if room == "adapters_store" else LEAVES)
    wrong = {name for name in imports(module) & MODULES.keys() if room_of(name) not in allowed}
    assert not wrong, f"{module} ({room}) may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(NO_TORCH))
def test_no_torch_comes_with_it(module: str) -> None:
    """Neither by itself nor by anything of ours it imports."""
    assert not reached(module) & {"torch", "transformers"}


def test_the_walk_sees_torch_where_it_is() -> None:
    assert "torch" in reached("server.engine.loop")


@pytest.mark.parametrize("module", MODULES)
def test_the_environment_is_read_in_one_place(module: str) -> None:
    if module == "server.settings":
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            assert name not in {"environ", "environb", "getenv"}, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_fit_a_screen(module: str) -> None:
    lines = MODULES[module].read_text().count("\n")
    assert lines <= MAX_LINES, f"{module} has {lines} lines"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{module}.{node.name} has {length} lines"


@pytest.mark.parametrize("module", MODULES)
def test_nothing_prints_or_unpickles(module: str) -> None:
    imported = imports(module)
    assert not imported & {"pickle", "marshal", "shelve", "dill", "joblib"}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "eval", "exec"}, f"{module}:{node.lineno}"


def test_every_room_exists() -> None:
    """A rule for a file that is gone guards nothing."""
    missing = {name for name in {*ROOMS, *NO_TORCH} if name not in MODULES}
    assert not missing


def test_every_library_is_a_declared_dependency() -> None:
    """None comes along by luck, because another one needs it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["otel"], *WITH_TORCH]
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in declared}
    used = {name for module in MODULES for name in imports(module) if name not in MODULES}
    distributions = packages_distributions()
    missing = {
        name
        for name in used - sys.stdlib_module_names
        if not names & {d.lower().replace("_", "-") for d in distributions.get(name, [name])}
    }
    assert not missing
