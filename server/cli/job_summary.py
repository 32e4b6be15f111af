"""Prints the outcome of a job: base and adapter compared, the version of `latest`, commands to try it."""

from typing import Any

import httpx
import typer

from server.cli.http_client import answer
from server.cli.output import print_table
from server.errors import NotFound, PolypeftError
from server.logs import visible

METRICS = {  # by the evaluation's keys: title and format
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "token_accuracy": ("tokens right", "{:.1%}"),
    "exact_match": ("answers right", "{:.1%}"),
    "label_accuracy": ("labels right", "{:.1%}"),
}


def print_outcome(client: httpx.Client, job: dict[str, Any], options: str, chats: bool | None = None) -> None:
    """Print the outcome of an ended job. `options` are those by which a command reaches the server.

    `chats`: whether the data are conversations, None if that is not known. Raises PolypeftError if the job
    published no version.
    """
    if job["status"] == "failed":
        raise PolypeftError(f"The job has failed: {visible(job['error']['message'])}")
    if job["status"] != "succeeded":
        raise PolypeftError(f"The job {job['id']} is {job['status']}: there is no new version.")
    name, model, evaluation = job["adapter"], job["fine_tuned_model"], job["evaluation"]
    if evaluation:
        print_table(("", "base", "adapter"), _rows(evaluation))
    latest = _latest_version(client, name)
    sentences = [_comparison_sentence(model, evaluation), _latest_sentence(job, latest)]
    if evaluation and evaluation["overfitted"]:
        best, last = evaluation["best_step"], evaluation["last_step"]
        sentences.append(f"It began to overfit: of {last} steps, the adapter of step {best} is kept.")
    typer.echo("\n" + "\n".join(sentences))
    if latest is None:
        return
    to_try = name if latest == job["version"] else model
    for command in [["chat"], ["complete"], ["chat", "complete"]][1 - chats if chats is not None else 2]:
        typer.echo(f"\n  polypeft {command} --adapter {to_try}{options}")


def _rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    base, adapter = evaluation["base"], evaluation["adapter"]
    rows = [
        (title, form.format(base[name]), form.format(adapter[name]))
        for name, (title, form) in METRICS.items()
        if name in base
    ]
    for line in evaluation["labels"]:
        total = line["examples"]
        label = f"  {visible(line['label'].strip())[:40]}"
        rows.append((label, f"{line['base']} of {total}", f"{line['adapter']} of {total}"))
    return rows


def _comparison_sentence(model: str, evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return f"Nothing was held out: whether {model} is better than the base is not known."
    examples = evaluation["examples"]
    held_out = f"on {examples} held-out example{'s' * (examples != 1)}"
    if evaluation["better"]:
        return f"{model} is better than the base {held_out}."
    return f"{model} is not better than the base {held_out}, or not by more than chance."


def _latest_sentence(job: dict[str, Any], latest: int | None) -> str:
    name, version = job["adapter"], job["version"]
    if latest is None:
        return f"{name} has been deleted since."
    if latest == version:
        return f"`latest` of {name} is now version {version}."
    return f"`latest` of {name} stays at version {latest}."


def _latest_version(client: httpx.Client, name: str) -> int | None:
    """The version that the bare name stands for; None for a deleted adapter."""
    try:
        version: int = answer(client.get(f"/v1/adapters/{name}"))["aliases"]["latest"]
    except NotFound:
        return None
    return version
