"""`polypeft tune`: train an adapter from a file of examples."""

import inspect
import json
import uuid
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console

from server.cli.data_files import DataFile, check_data, delete_if_new, upload
from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection, options_to_reach
from server.cli.job_follow import follow
from server.cli.job_summary import print_outcome
from server.cli.retry import retry_while_away
from server.cli.training_options import METHODS_HELP, recipe_blocks, training_parameters
from server.errors import PolypeftError, Unavailable

INTERRUPTED = 130  # exit status, as a shell has it for SIGINT


def tune(
    data: Annotated[Path, typer.Argument(help="JSONL: messages, or prompt and completion, or text.")],
    method: Annotated[str, typer.Option(help=METHODS_HELP)] = "lora",
    name: Annotated[
        str | None, typer.Option(help="The adapter's; one that exists gets its next version.")
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Held-out examples; else a tenth of the data.")
    ] = None,
    seed: Annotated[str | None, typer.Option(help="The same seed gives the same adapter.")] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the job's id, and leave it.")] = False,
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
    **training: Any,
) -> None:
    """Train an adapter, show how that goes, compare it with the base. What is unset suits method and data."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    body = {"suffix": name, "seed": _number(seed)} | recipe_blocks(method, training)
    with connection(url, key, data_dir) as client:
        job = _create(client, body, data, validation, console)
        if detach:
            typer.echo(job["id"])
            return
        watch(client, job["id"], options_to_reach(url, data_dir), chats=_chats(data))


def watch(client: httpx.Client, job: str, options: str, chats: bool | None = None) -> None:
    """Follow a job to its end and print the outcome. Ctrl-C stops following, not the job."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"Job {job}. Ctrl-C leaves it running; to see it again: polypeft jobs follow {job}{options}"
    )
    try:
        ended = follow(client, job)
    except KeyboardInterrupt:
        console.print(f"The job goes on. To end it: polypeft jobs cancel {job}{options}")
        raise typer.Exit(INTERRUPTED) from None
    print_outcome(client, ended, options, chats)


def _create(
    client: httpx.Client, body: dict[str, Any], data: Path, validation: Path | None, console: Console
) -> dict[str, Any]:
    """Upload the files and create the job. If it is refused, the new files are deleted."""
    limits = answer(client.get("/v1/limits"))
    paths = [data, *([validation] if validation else [])]
    for path in paths:
        check_data(path, limits["max_file_bytes"])
    files: list[DataFile] = []
    try:
        for path in paths:
            files.append(upload(client, path, console))  # noqa: PERF401 - kept if a later one fails
        fields = dict(zip(("training_file", "validation_file"), (file.id for file in files), strict=False))
        with console.status("Checking the data"):
            return _job(client, {"model": limits["model"], **fields, **body}, console)
    except Unavailable:
        raise  # the job may have been created, and need them
    except PolypeftError:
        for file in files:
            delete_if_new(client, file)
        raise


def _job(client: httpx.Client, body: dict[str, Any], console: Console) -> dict[str, Any]:
    """Create the job, again until there is an answer: the Idempotency-Key makes it the same job."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    fields = {name: value for name, value in body.items() if value is not None}
    job: dict[str, Any] = retry_while_away(
        lambda: answer(client.post("/v1/fine_tuning/jobs", json=fields, headers=headers)),
        lambda error: console.print(f"The server does not answer ({error}); trying again."),
    )
    return job


def _number(text: str | None) -> int | str | None:
    """An integer, or the text as it is, for the server to refuse."""
    return int(text) if text is not None and text.isascii() and text.isdecimal() and len(text) < 20 else text


def _chats(data: Path) -> bool:
    """Whether the first example is a conversation. The server has validated the file."""
    with data.open(encoding="utf-8-sig") as file:
        first = json.loads(next(line for line in file if line.strip()))
    return bool(first.get("messages")) or isinstance(first.get("prompt"), list)


# typer generates options from the function's signature
_declared = inspect.signature(tune, eval_str=True).parameters.values()
tune.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [parameter for parameter in _declared if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    + training_parameters()
)
