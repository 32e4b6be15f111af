"""Versions of this build, for the metric `polypeft_build_info`. Imports no torch."""

import platform
from importlib.metadata import version

import server


def build(model: str) -> tuple[str, str, str, str]:
    """Values for the labels of `polypeft_build_info`."""
    return server.__version__, platform.python_version(), version("torch"), model
