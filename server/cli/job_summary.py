"""How a job ended: the base against the adapter, what `latest` is now, and how to talk to it."""

from typing import Any

import httpx
import typer

from server.cli.http_client import answer
from server.cli.output import print_table
from server.errors import NotFound, PolypeftError
from server.logs import visible

FIGURES = {
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.4g}"),
    "token_accuracy": ("tokens right", "{:.1%}"),
    "exact_match": ("answers right", "{:.1%}"),
    "label_accuracy": ("labels right", "{:.1%}"),
}


def print_outcome(client: httpx.Client, job: dict[str, Any], options: str, chats: bool | None = None) -> None:
    """Raises PolypeftError for a job that brought no version. `options` reach the server from a command
    line; `chats`: whether the data were conversations, None where that is not known.
    """
    if job["status"] == "failed":
        raise PolypeftError(f"The job has failed: {visible(job['error']['message'])}")
    if job["status"] != "succeeded":
        raise PolypeftError(f"The job {job['id']} is {job['status']}: there is no new version.")
    name, model, evaluation = job["adapter"], job["fine_tuned_model"], job["evaluation"]
    if evaluation:
        print_table(("", "base", "adapter"), _rows(evaluation))
    latest = _latest(client, name)
    sentences = [_verdict(model, evaluation), _standing(job, latest)]
    if evaluation and evaluation["overfitted"]:
        best, last = evaluation["best_step"], evaluation["last_step"]
        sentences.append(f"It began to overfit: of {last} steps, the adapter of step {best} is kept.")
    typer.echo("\n" + "\n".join(sentences))
    if latest is None:
        return
    used = name if latest == job["version"] else model
    for command in [["chat"], ["complete"], ["chat", "complete"]][1 - chats if chats is not None else 2]:
        typer.echo(f"\n  polypeft {command} --adapter {used}{options}")


def _rows(evaluation: dict[str, Any]) -> list[tuple[str, str, str]]:
    base, adapter = evaluation["base"], evaluation["adapter"]
    rows = [
        (title, form.format(base[name]), form.format(adapter[name]))
        for name, (title, form) in FIGURES.items()
        if name in base
    ]
    for line in evaluation["labels"]:
        total = line["examples"]
        label = f"  {visible(line['label'].strip())[:40]}"
        rows.append((label, f"{line['base']} of {total}", f"{line['adapter']} of {total}"))
    return rows


def _verdict(model: str, evaluation: dict[str, Any] | None) -> str:
    if not evaluation:
        return f"Nothing was held out: whether {model} is better than the base is not known."
    examples = evaluation["examples"]
    held_out = f"on {examples} held-out example{'s' * (examples != 1)}"
    if evaluation["better"]:
        return f"{model} is better than the base {held_out}."
    return f"{model} is not better than the base {held_out}, or not by more than chance."


def _standing(job: dict[str, Any], latest: int | None) -> str:
    name, version = job["adapter"], job["version"]
    if latest is None:
        return f"{name} has been deleted since."
    if latest == version:
        return f"`latest` of {name} is now version {version}."
    return f"`latest` of {name} stays at version {latest}."


def _latest(client: httpx.Client, name: str) -> int | None:
    """The version that the bare name means; None for an adapter that is gone."""
    try:
        found: int = answer(client.get(f"/v1/adapters/{name}"))["aliases"]["latest"]
    except NotFound:
        return None
    return found
