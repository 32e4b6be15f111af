"""Compile the CPU kernels that most tests run, into numba's cache beside their sources.

make kernels     half a minute of one core: tests that start with an empty cache start several processes
                 at once, each of which compiles all of them
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from server.finetune.training.run import run_training
from tests.fixtures.engine import Stand, run
from tests.fixtures.models import build_tiny
from tests.server.engine.test_mixed_methods import kinds
from tests.server.finetune.small_trainings import Memory, recipe, write

RECORDS = [{"prompt": f"Is {i} even? ", "completion": "no" if i % 2 else "yes"} for i in range(8)]


def serve(model: Path, folder: Path, **settings: Any) -> None:
    """A row of each kind of adapter, and one of none."""
    stand = Stand(model, folder, 0, **settings)
    run(stand.engine, [stand.generate(i, ref) for i, ref in enumerate([*kinds(stand).values(), None])])
    stand.engine.close()


def train(model: Path, folder: Path, method: str) -> None:
    folder.mkdir()
    data = write(folder / "data.jsonl", RECORDS)
    run_training(recipe(method, n_epochs=1), model, data, None, folder / "work", Memory(), base_id="tiny")


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        for family in ("llama", "gpt2"):
            build_tiny(family, folder / family)
            serve(folder / family, folder / f"{family}-float32")
        for method in ("lora", "bottleneck"):
            train(folder / "llama", folder / method, method)
        serve(folder / "llama", folder / "int8", quantize="int8")
        serve(folder / "llama", folder / "bfloat16", dtype="bfloat16")


if __name__ == "__main__":
    main()
