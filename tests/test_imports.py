"""The shape of the code, read off its source: imports go one way, and a few things stand in one place only.

A room is a folder. HTTP and commands stand at one end, storage at the other:

api -> engine.client -> engine -> adapters -> adapters_store
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("server", "adapters_store", "tests", "benchmarks")
FILES = sorted(path for package in ("server", "adapters_store") for path in (ROOT / package).rglob("*.py"))

# Vocabulary: what everything in server may import, and what imports nothing but vocabulary.
LEAVES = {
    "server.errors",
    "server.origins",
    "server.settings",
    "server.messages",
    "server.atomic_files",
    "server.json_reader",
    "server.adapters.sites",
    "server.base_model.families",
    "server.metrics.engine_names",
    "server.metrics.family",
    "server.metrics.labels",
    "server.metrics.names",
}
# The processes' frames: they import what they like, and nothing else imports them.
FRAMES = {"server.api.app", "server.api.__main__", "server.cli.main"}
STORE = {
    "adapters_store",
    "adapters_store.index",
    "adapters_store.maintenance",
    "adapters_store.object_store",
    "adapters_store.registry",
}
KERNELS = {
    "server.kernels",
    "server.kernels.cpu",
    "server.kernels.cpu.int8",
    "server.kernels.gpu",
    "server.kernels.weight_formats",
}
SPECS = {"server.adapters.formats", "server.adapters.specs"}
METHODS = {*SPECS, "server.adapters", "server.adapters.methods"}
# Of each room, the rooms it may import beside the leaves. Files beside folders are rooms by name.
ROOMS: dict[str, set[str]] = {
    "adapters_store": {"server.errors"},
    "adapters_store.object_store": {"server.atomic_files", "server.errors"},
    "adapters_store.index": {"server.errors", "adapters_store"},
    "adapters_store.maintenance": {
        "server.errors",
        "adapters_store",
        "adapters_store.index",
        "adapters_store.object_store",
    },
    "adapters_store.registry": {
        "server.errors",
        "adapters_store",
        "adapters_store.index",
        "adapters_store.maintenance",
        "adapters_store.object_store",
    },
    "server": set(),  # __init__: the version
    "server.errors": set(),
    "server.origins": set(),
    "server.settings": {"server.origins"},
    "server.messages": set(),
    "server.atomic_files": set(),
    "server.json_reader": set(),
    "server.adapters.sites": {"server.base_model.families"},
    "server.base_model.families": set(),
    "server.metrics.family": set(),
    "server.metrics.labels": set(),
    "server.metrics.engine_names": {"server.metrics.family", "server.metrics.labels"},
    "server.metrics.names": {"server.metrics.engine_names", "server.metrics.family", "server.metrics.labels"},
    "server.logs": set(),
    "server.tracing": set(),
    "server.child_process": {"server.logs"},
    "server.build_info": {"server"},
    "server.memory": set(),
    "server.metrics": {"server.build_info", "server.memory"},
    "server.base_model": set(),
    "server.tenancy": {"adapters_store"},
    "server.audit": {"adapters_store"},
    "server.kernels": set(),
    "server.kernels.cpu": {"server.kernels"},
    "server.kernels.cpu.int8": {"server.kernels", "server.kernels.cpu"},
    "server.kernels.gpu": {"server.kernels", "server.kernels.cpu"},
    "server.kernels.weight_formats": {"server.kernels.cpu", "server.kernels.cpu.int8"},
    "server.adapters": {"server.adapters.formats"},
    "server.adapters.formats": set(),
    "server.adapters.specs": {"server.adapters.formats", "server.kernels"},
    "server.adapters.methods": {*SPECS, "server.adapters", *KERNELS},
    "server.adapters.cache": {"server.adapters", "adapters_store.object_store"},
    "server.adapters.loading": {*METHODS, "server.adapters.cache", *STORE, *KERNELS},
    "server.engine.client": set(),
    "server.engine.metrics": {
        "server.adapters.loading",
        "server.adapters.methods",
        "server.engine.model",
        "server.engine.scheduling",
        "server.usage",
    },
    "server.engine.scheduling": {"server.adapters.cache"},
    "server.engine.model": {"server.adapters.methods", "server.engine.scheduling", *KERNELS},
    "server.engine.cpu": {"server.adapters.methods", "server.engine.model", *KERNELS},
    "server.engine.cuda": {
        "server.adapters.methods",
        "server.engine.model",
        "server.engine.scheduling",
        *KERNELS,
    },
    "server.engine": {
        "server.adapters.cache",
        "server.adapters.loading",
        "server.base_model",
        "server.child_process",
        "server.engine.cpu",
        "server.engine.cuda",
        "server.engine.metrics",
        "server.engine.model",
        "server.engine.scheduling",
        "server.memory",
        "server.usage",
        *METHODS,
        *STORE,
        *KERNELS,
    },
    "server.files": {"server.tenancy", *STORE},
    "server.usage": {"adapters_store"},
    "server.finetune": {"server.adapters.formats"},
    "server.finetune.data": {"server.base_model", "server.finetune"},
    "server.finetune.jobs": {
        "server.finetune",
        "server.files",
        "server.tenancy",
        "server.usage",
        *STORE,
    },
    "server.finetune.modeling": {
        "server.engine.cpu",
        "server.engine.model",
        "server.finetune",
        "server.finetune.data",
        "server.memory",
        *METHODS,
        *KERNELS,
    },
    "server.finetune.training": {
        "server.base_model",
        "server.finetune",
        "server.finetune.data",
        "server.finetune.jobs",
        "server.finetune.modeling",
    },
    "server.finetune.worker": {
        "server.base_model",
        "server.build_info",
        "server.child_process",
        "server.engine.model",
        "server.files",
        "server.finetune",
        "server.finetune.jobs",
        "server.finetune.training",
        "server.metrics",
        "server.memory",
        *STORE,
    },
    "server.finetune.__main__": {"server.child_process", "server.finetune.worker"},
    "server.api": {
        "server.audit",
        "server.base_model",
        "server.engine.client",
        "server.files",
        "server.finetune.jobs",
        "server.logs",
        "server.metrics",
        "server.tenancy",
        "server.tracing",
        "server.usage",
        *SPECS,
        *STORE,
    },
    "server.api.http": {
        "adapters_store.object_store",
        "server.api",
        "server.audit",
        "server.files",
        "server.finetune.jobs",
        "server.logs",
        "server.metrics",
        "server.tenancy",
        "server.tracing",
        "server.usage",
    },
    "server.api.asgi": {
        "server.api.http",
        "server.logs",
        "server.metrics",
        "server.tenancy",
        "server.tracing",
    },
    "server.api.structured_output": {"server.api.http"},
    "server.api.tools": {
        "server.api",
        "server.api.http",
        "server.api.structured_output",
        "server.base_model",
    },
    "server.api.generation": {
        "adapters_store",
        "adapters_store.index",
        "server.api",
        "server.api.http",
        "server.api.structured_output",
        "server.api.tools",
        "server.base_model",
        "server.engine.client",
        "server.tenancy",
        "server.tracing",
        "server.usage",
    },
    "server.api.adapters": {
        "server.api",
        "server.audit",
        "server.api.http",
        "server.engine.client",
        "server.files",
        "server.finetune.jobs",
        "server.tenancy",
        *SPECS,
        *STORE,
    },
    "server.api.fine_tuning": {
        "server.api",
        "server.api.http",
        "server.files",
        "server.finetune",
        "server.finetune.data",
        "server.finetune.jobs",
    },
    "server.api.schema": {"server", "server.api.http"},
    "server.api.routes": {
        "server",
        "server.adapters.formats",
        "server.api",
        "server.audit",
        "server.api.adapters",
        "server.api.fine_tuning",
        "server.api.generation",
        "server.api.http",
        "server.api.schema",
        "server.api.structured_output",
        "server.api.tools",
        "server.engine.client",
        "server.files",
        "server.finetune",
        "server.finetune.jobs",
        "server.tenancy",
        "server.usage",
        *STORE,
    },
    "server.supervisor": {"server.child_process", "server.logs"},
    "server.cli": {"server.finetune", "server.logs"},
    "server.cli.commands": {
        "server.adapters.formats",
        "server.base_model",
        "server.cli",
        "server.engine.model",
        "server.logs",
        "server.supervisor",
        "server.tenancy",
        *STORE,
    },
}
NO_TORCH = {
    "server.engine.scheduling.scheduler",
    "server.engine.scheduling.kv_blocks",
    "server.engine.model.memory_estimate",
    "server.engine.scheduling.row",
    "server.adapters.cache.device_cache",
    "server.errors",
    "server.settings",
    "server.adapters.formats.detect",
    "server.adapters.formats.ignored_files",
    "server.adapters.formats.pickle_sandbox",
    "server.adapters.sites",
    "server.adapters.specs",
    "server.messages",
    "server.engine.client",
    "server.supervisor.system",
    "server.cli",
    "server.finetune.recipe",
    "server.files.files",
    "server.files.uploads",
    "server.finetune.jobs.jobs",
    "server.finetune.jobs.queue",
    "server.finetune.jobs.publisher",
    "server.finetune.jobs.stats",
    "server.finetune.worker.metrics",
    "server.finetune.worker.worker",
    "server.tracing",
    "server.metrics",
    "server.usage.ledger",
    "server.base_model.control_tokens",
    "server.base_model.hub",
    "server.base_model.families",
    "server.base_model.resolve",
    "adapters_store.registry.registry",
}
# It asks transformers for a folder's tokenizer, which loads no torch in a process that forbids it:
# tests/server/base_model/test_text_process.py looks.
TEXT = "server.base_model.tokenizer"
HEAVY = {"numba", "torch", "transformers"}
WITH_TORCH = ["triton"]  # comes with its CUDA build; kernels/token_blocks.py says where it is imported
MAX_LINES, MAX_FUNCTION_LINES, MAX_FOLDER_FILES = 300, 60, 16


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
    allowed = ROOMS[room] | {room} | (set() if room.startswith("adapters_store") else LEAVES)
    wrong = {name for name in imports(module) & MODULES.keys() if room_of(name) not in allowed}
    assert not wrong, f"{module} ({room}) may not import {sorted(wrong)}"


def test_rooms_lead_one_way() -> None:
    """No room leads back to itself, over however many others."""
    order = TopologicalSorter({room: nexts & ROOMS.keys() for room, nexts in ROOMS.items()})
    order.prepare()


@pytest.mark.parametrize("module", sorted(NO_TORCH))
def test_no_torch_comes_with_it(module: str) -> None:
    """Neither by itself nor by anything of ours it imports."""
    assert not reached(module) & HEAVY


@pytest.mark.parametrize("module", [TEXT, "server.api.app", "server.api.__main__"])
def test_the_api_imports_no_torch(module: str) -> None:
    """It asks transformers for a tokenizer, and for nothing else."""
    assert not reached(module) & {"torch", "numba"}
    assert {name for name in reached(module) & MODULES.keys() if "transformers" in imports(name)} == {TEXT}


def test_uploads_are_checked_without_torch() -> None:
    """Nor does a library that the specs or the formats import bring it along."""
    program = f"import sys, server.adapters.specs; sys.exit(bool({HEAVY} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_walk_sees_torch_where_it_is() -> None:
    assert "torch" in reached("server.engine.engine")


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


def test_a_folder_is_seen_at_a_glance() -> None:
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    count = Counter(str(path.parent.relative_to(ROOT)) for path in files)
    assert not {folder: number for folder, number in count.items() if number > MAX_FOLDER_FILES}


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
