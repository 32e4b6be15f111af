"""What this process is made of, as figures show it. Loads nothing."""

import platform
from importlib.metadata import version

import server


def build(model: str) -> tuple[str, str, str, str]:
    """Values for the labels of `polypeft_build_info`."""
    return server.__version__, platform.python_version(), version("torch"), model
