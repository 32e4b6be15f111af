"""`polypeft size`: estimates the memory of a server from the model's config.json alone."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from server.base_model.resolve import resolve_config
from server.cli.options import read_settings
from server.cli.output import print_table
from server.engine.model.memory_estimate import (
    BATCH_TOKENS,
    Deployment,
    MemoryItem,
    Shapes,
    adapter_bytes,
    estimate_memory,
)
from server.errors import InvalidField, StartupError
from server.settings import OFFLINE, Settings, inherited_environment


def size(
    model: Annotated[str | None, typer.Option(help="A folder, a hub id, or the default model.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where fetched models lie.")] = None,
    adapters: Annotated[int, typer.Option(min=1, help="Adapters that tenants keep.")] = 1000,
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Their LoRA rank, on all linears.")] = 16,
    seqs: Annotated[int, typer.Option(min=1, max=1024, help="Rows in a batch.")] = 32,
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer of a row.")] = 2048,
    slots: Annotated[int, typer.Option(min=1, max=4096, help="Adapters on the device at once.")] = 64,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where the model computes.")] = "cpu",
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Of weights and KV cache.")
    ] = "auto",
) -> None:
    """How much memory a server needs, as a table, and the options of `serve` for it. Reads no weights."""
    settings = read_settings({"model": model, "data_dir": data_dir})
    shapes = shapes_of(settings)
    if context > shapes.base.max_context:
        raise InvalidField(
            f"--context {context} is more than {shapes.base.max_context}, the model's own.", param="context"
        )
    on_cpu = device == "cpu"
    chosen = dtype if dtype != "auto" else ("float32" if on_cpu else "bfloat16")
    plan = Deployment(chosen, on_cpu, seqs, context, BATCH_TOKENS[device], adapters, slots, rank)
    parts = estimate_memory(shapes, plan)
    rows = [(part.what, part.bytes, readable(part.bytes), part.where, part.how) for part in parts]
    print_table(("part", "bytes", "", "where", "how"), [*rows, *_totals(parts, on_cpu=on_cpu)])
    typer.echo(f"\npolypeft serve {' '.join(options(shapes, plan, parts))}", err=True)


def shapes_of(settings: Settings) -> Shapes:
    """The model's shapes by its config.json, from a child process that imports torch. Raises StartupError."""
    folder = resolve_config(settings)
    command = [sys.executable, "-m", "server.engine.model.config_shapes", str(folder)]
    environment = inherited_environment() | OFFLINE
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
        raise StartupError(f"--model {settings.model!r} cannot be sized: {reason}", param="model")
    return msgspec.json.decode(done.stdout, type=Shapes)


def options(shapes: Shapes, plan: Deployment, parts: list[MemoryItem]) -> list[str]:
    """The options of `serve` for the memory in the table."""
    known = {part.what: part.bytes for part in parts}
    one = adapter_bytes(shapes, plan.rank, plan.dtype)
    mebibyte = 1 << 20
    return [
        f"--max-seqs {plan.seqs}",
        f"--max-model-len {plan.context}",
        f"--kv-bytes {max(known['KV cache'], mebibyte)}",
        f"--adapter-slots {min(plan.slots, plan.adapters)}",
        f"--adapter-device-bytes {max(known['adapters in slots'], one, mebibyte)}",
        f"--adapter-ram-bytes {max(known['adapters in RAM'], mebibyte)}",
        f"--adapter-disk-bytes {max(known['adapters on disk'], mebibyte)}",
    ]


def _totals(parts: list[MemoryItem], *, on_cpu: bool) -> list[tuple[str, int, str, str, str]]:
    memory = {"host": ("device", "host")} if on_cpu else {"device": ("device",), "host": ("host",)}
    rows = []
    for where, places in memory.items():
        total = sum(part.bytes for part in parts if part.where in places)
        rows.append((f"{where}, together", total, readable(total), where, "give 20% more"))
    return rows


def readable(count: int) -> str:
    """Bytes in the unit that has one to four digits before the point."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
