"""`polypeft jobs`: a tenant's fine-tuning jobs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from server.cli.commands.tune import watch
from server.cli.data_files import download
from server.cli.http_client import DEFAULT_URL, DataDir, Key, Url, answer, connection, options_to_reach, pages
from server.cli.output import print_table

jobs = typer.Typer(help="A tenant's fine-tuning jobs.", no_args_is_help=True)

Job = Annotated[str, typer.Argument(help="The job's id, as `tune` and `jobs list` show it.")]
PATH = "/v1/fine_tuning/jobs"


@jobs.command("list")
def list_(url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """All of them, the newest first."""
    with connection(url, key, data_dir) as client:
        print_table(("id", "status", "adapter", "method", "step"), map(_row, pages(client, PATH)))


@jobs.command()
def show(job: Job, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """One job, as JSON."""
    with connection(url, key, data_dir) as client:
        job_object = answer(client.get(f"{PATH}/{job}"))
    Console().print_json(data=job_object)


@jobs.command()
def follow(job: Job, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Show how it goes on, and at its end what came of it."""
    with connection(url, key, data_dir) as client:
        answer(client.get(f"{PATH}/{job}"))
        watch(client, job, options_to_reach(url, data_dir))


@jobs.command()
def results(
    job: Job,
    into: Annotated[Path, typer.Option(help="Where to write them.")] = Path(),
    url: Url = DEFAULT_URL,
    key: Key = None,
    data_dir: DataDir = None,
) -> None:
    """Fetch what a job has left: its figures by step (CSV) and a plot of its losses (PNG)."""
    with connection(url, key, data_dir) as client:
        for id_ in answer(client.get(f"{PATH}/{job}"))["result_files"]:
            typer.echo(download(client, id_, into))


@jobs.command()
def cancel(job: Job, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """End it; nothing of it will be published."""
    _post(job, "cancel", url, key, data_dir)


@jobs.command()
def pause(job: Job, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Let it rest, as soon as what it has learnt is saved."""
    _post(job, "pause", url, key, data_dir)


@jobs.command()
def resume(job: Job, url: Url = DEFAULT_URL, key: Key = None, data_dir: DataDir = None) -> None:
    """Let a paused one go on where it was."""
    _post(job, "resume", url, key, data_dir)


def _post(job: str, action: str, url: str, key: str | None, data_dir: Path | None) -> None:
    with connection(url, key, data_dir) as client:
        job_object = answer(client.post(f"{PATH}/{job}/{action}"))
    typer.echo(f"{job} is {_status(job_object)}.")


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    progress = job["progress"]
    step = f"{progress['step']}/{progress['total_steps']}" if progress["total_steps"] else "-"
    return job["id"], _status(job), job["adapter"], job["method"]["peft"]["type"], step


def _status(job: dict[str, Any]) -> str:
    return "paused" if job["paused"] else str(job["status"])
