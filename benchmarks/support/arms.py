"""The systems compared, each alone in a child process that waits between its turns.

An arm gets prompts of equal length and answers with each row's greedy tokens, as many as asked for
whatever they are. It runs in the same precision (fp32) and on as many threads as every other arm.
"""

import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

WARM_TOKENS = 3


@dataclass(frozen=True)
class Job:
    """What stays the same over a whole run. Row i uses adapter i, where an arm uses adapters."""

    model: Path
    adapters: list[Path]
    threads: int
    new_tokens: int


@dataclass(frozen=True)
class Result:
    seconds: float
    tokens: list[list[int]]


class System(Protocol):
    """One loaded model; `generate` yields `new` tokens by row for prompts [rows][length]."""

    def generate(self, prompts: list[list[int]], adapters: bool, new: int) -> list[list[int]]: ...


class Transformers:
    """`generate` of the plain class: all rows in one batch."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            job.model, dtype=torch.float32, local_files_only=True
        )
        self.options = generate_options(self.model)

    def generate(self, prompts: list[list[int]], adapters: bool, new: int) -> list[list[int]]:
        if adapters:
            raise ValueError("transformers alone serves no adapters")
        return _generate(self.model, prompts, max_new_tokens=new, **self.options)


class Peft:
    """Every adapter loaded beside one base."""

    def __init__(self, job: Job) -> None:
        from peft import PeftModel

        plain = Transformers(job)
        self.options = plain.options
        self.model: Any = PeftModel.from_pretrained(plain.model, job.adapters[0], adapter_name="0")
        for i, folder in enumerate(job.adapters[1:], start=1):
            self.model.load_adapter(folder, adapter_name=str(i))
        self.model.eval()


class PeftMixed(Peft):
    """One batch in which every row names its adapter."""

    def generate(self, prompts: list[list[int]], adapters: bool, new: int) -> list[list[int]]:
        names = [str(i) if adapters else "__base__" for i in range(len(prompts))]
        return _generate(self.model, prompts, adapter_names=names, max_new_tokens=new, **self.options)


class PeftSwitch(Peft):
    """One row after the other, each after `set_adapter`: what users do who do not know of mixed batches."""

    def generate(self, prompts: list[list[int]], adapters: bool, new: int) -> list[list[int]]:
        if not adapters:
            raise ValueError("there is nothing to switch between")
        found = []
        for i, prompt in enumerate(prompts):
            self.model.set_adapter(str(i))
            found += _generate(self.model, [prompt], max_new_tokens=new, **self.options)
        return found


def generate_options(model: Any) -> dict[str, Any]:
    """Greedy, exactly as many tokens as asked for: no token ends a row."""
    model.eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return {"do_sample": False, "use_cache": True}


@torch.inference_mode()
def _generate(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    ids = torch.tensor(prompts)
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
    return rows


class Polypeft:
    """Our engine in process; prompts are never cached, and unless told so nothing is guessed."""

    def __init__(self, job: Job, *, lookup: bool = False, **settings: Any) -> None:
        from adapters_store.object_store.store import Objects
        from server.engine.engine import Engine
        from server.settings import Settings
        from tests.fixtures.engine import publish

        self.folder = tempfile.TemporaryDirectory(prefix="polypeft-benchmark-")
        chosen = Settings(
            data_dir=Path(self.folder.name),
            threads=job.threads,
            prefix_cache=False,
            lookup_tokens=7 if lookup else 0,
            **settings,
        )
        self.engine = Engine(chosen, job.model)
        objects = Objects.open(chosen.store_url)
        self.refs = [publish(objects, self.engine.base, folder) for folder in job.adapters]

    def generate(self, prompts: list[list[int]], adapters: bool, new: int) -> list[list[int]]:
        from server.messages import Generate, Sampling
        from tests.fixtures.engine import run

        sampling = Sampling(max_tokens=new, temperature=0.0, ignore_eos=True, seed=0)
        commands = [
            Generate(str(i), "tenant", prompt, sampling, self.refs[i] if adapters else None)
            for i, prompt in enumerate(prompts)
        ]
        return [done.tokens for done in run(self.engine, commands)]


SYSTEMS: dict[str, Callable[[Job], System]] = {
    "polypeft": Polypeft,
    "polypeft-bf16": partial(Polypeft, lora_dtype="bfloat16"),
    "polypeft-lookup": partial(Polypeft, lookup=True),
    "polypeft-int8": partial(Polypeft, quantize="int8"),
    "polypeft-int8-lookup": partial(Polypeft, quantize="int8", lookup=True),
    "transformers": Transformers,
    "peft-mixed": PeftMixed,
    "peft-switch": PeftSwitch,
}


def quiet() -> None:
    """No progress bars and deprecations of other people's code between our own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


class Child:
    """A process of its own, which inherits nobody's threads or memory; it says when it has loaded."""

    def __init__(self, target: Callable[..., None], *given: object) -> None:
        """`target` is called with `given`, and the connection to us."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(*given, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.connection.recv()  # loaded

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.terminate()


class Remote(Child):
    """A system in a child process."""

    def __init__(self, system: str, job: Job) -> None:
        super().__init__(_serve, system, job)

    def generate(self, prompts: list[list[int]], *, adapters: bool) -> Result:
        """Raises EOFError when the child died; its own traceback is on stderr."""
        self.connection.send((prompts, adapters))
        result: Result = self.connection.recv()
        return result


def _serve(name: str, job: Job, connection: Connection) -> None:
    quiet()
    torch.set_num_threads(job.threads)
    answer(SYSTEMS[name](job), job, connection)


def answer(system: System, job: Job, connection: Connection) -> None:
    """A child's life."""
    connection.send("loaded")
    while True:
        try:
            prompts, adapters = connection.recv()
        except EOFError:
            return
        # Untimed: what lay idle while others had their turn may have left the caches, or even memory.
        system.generate(prompts, adapters, WARM_TOKENS)
        start = time.perf_counter()
        tokens = system.generate(prompts, adapters, job.new_tokens)
        connection.send(Result(time.perf_counter() - start, tokens))
