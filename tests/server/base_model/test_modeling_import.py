"""The engine imports transformers without what it never uses, and what is left out stays importable."""

import subprocess
import sys

LOOK = """
import sys
from server.base_model.modeling_import import import_modeling
import_modeling()
import server.engine.server
print(*{"torch._dynamo", "torch.distributed.tensor", "sympy"} & sys.modules.keys())

import torch
from transformers.utils import is_torch_distributed_available
print(is_torch_distributed_available() == torch.distributed.is_available())
print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item(), bool(torch._dynamo.__file__))
"""


def test_the_engine_imports_no_compiler_and_it_is_there_later() -> None:
    said = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout
    left_out, distributed, compiled = said.splitlines()
    assert left_out == ""
    assert distributed == "True"
    assert compiled == "2.0 True"
