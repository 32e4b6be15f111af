"""constraints.txt: the versions that CI ran with. What it pins fits what the project declares."""

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TORCH_CHOOSES = {"triton"}


def name_of(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", Requirement(requirement).name).lower()


def test_every_dependency_is_pinned_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {name_of(line): line.partition("==")[2] for line in lines if not line.startswith("#")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, declared):
        if requirement.name not in TORCH_CHOOSES:
            pin = pins.get(name_of(str(requirement)))
            assert pin is not None, f"{requirement} is not pinned"
            assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"
