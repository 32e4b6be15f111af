"""`polypeft`: the command line, a file for each command. All but `serve` speak HTTP to a running server."""

from typing import Annotated

import typer

from server import __version__
from server.cli.commands.adapters import adapters
from server.cli.commands.admin import admin
from server.cli.commands.chat import chat
from server.cli.commands.complete import complete
from server.cli.commands.jobs import jobs
from server.cli.commands.serve import serve
from server.cli.commands.size import size
from server.cli.commands.tenants import tenants
from server.cli.commands.tune import tune
from server.cli.commands.worker import worker
from server.cli.output import print_error
from server.errors import PolypeftError, disk_error

app = typer.Typer(
    help="Serve thousands of tenants' adapters on one frozen base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals hold keys
)
app.command()(serve)
app.command()(worker)
app.command()(chat)
app.command()(complete)
app.command()(tune)
app.command()(size)
app.add_typer(tenants, name="tenants")
app.add_typer(adapters, name="adapters")
app.add_typer(jobs, name="jobs")
app.add_typer(admin, name="admin")


def main() -> None:
    """The entry point. What goes wrong as foreseen is one sentence on stderr and status 1."""
    try:
        app()
    except PolypeftError as error:
        print_error(error.message)
        raise SystemExit(1) from None
    except OSError as error:
        if disk_error(error) is None:
            raise
        print_error(f"Cannot write {error.filename or 'to the disk'}: {error.strerror}.")
        raise SystemExit(1) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Without this, typer would take the first command for the whole program."""
