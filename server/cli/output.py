"""Output of the commands: for people at a terminal, for programs in a pipe."""

from collections.abc import Iterable, Sequence

import typer
from rich.console import Console
from rich.table import Table


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table at a terminal; lines of tab-separated values, without a header, in a pipe."""
    console = Console(markup=False)
    if not console.is_terminal:
        for row in rows:
            typer.echo("\t".join(map(str, row)))
        return
    table = Table(*columns, box=None)
    for row in rows:
        table.add_row(*map(str, row))
    console.print(table)


def print_error(sentence: str) -> None:
    """On stderr, in red at a terminal."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(sentence, style="red")
