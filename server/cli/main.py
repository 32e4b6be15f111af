"""`polypeft`: the command line, a module for each command. All but `serve` speak HTTP to a running server.

Only the module of the command that runs is imported: together they take a second to load.
"""

from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from server import __version__
from server.cli.output import print_error
from server.errors import PolypeftError, disk_error

# the commands in the order of --help, each with the first paragraph of its own help
SUMMARIES = {
    "serve": "Start Valkey, engine and API as one, and stop them as one. "
    "Every option is also POLYPEFT_<OPTION>.",
    "worker": "Train jobs of servers that have the same model, --store and --redis-url. "
    "Ctrl-C hands a job on.",
    "chat": "Talk to the base or to one adapter. Ctrl-D ends it.",
    "complete": "Go on with a text as it stands, without the marks of a conversation around it.",
    "tune": "Train an adapter, show how that goes, compare it with the base. "
    "What is unset suits method and data.",
    "size": "How much memory a server needs, as a table, and the options of `serve` for it. "
    "Reads no weights.",
    "tenants": "Tenants, their keys and limits (operator).",
    "keys": "A tenant's own API keys; with --tenant another's.",
    "audit": "The audit log, newest first.",
    "usage": "What was used, day by day: by a tenant with its --key, else by all (operator). "
    "By default, a week.",
    "adapters": "A tenant's adapters.",
    "jobs": "A tenant's fine-tuning jobs.",
    "admin": "Repairs and imports (operator).",
}


class LazyGroup(TyperGroup):
    """Lists commands by their SUMMARIES; loads the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for name, summary in SUMMARIES.items():
            self.commands[name] = TyperCommand(name, help=summary)

    def resolve_command(
        self, ctx: Any, args: list[str]
    ) -> tuple[str | None, TyperCommand | TyperGroup | None, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(name) if name else None, rest


app = typer.Typer(
    cls=LazyGroup,
    help="Serve thousands of tenants' adapters on one frozen base model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals hold keys
)


def load_command(name: str) -> TyperCommand | TyperGroup:
    """The command or group that the module of this name defines under the same name."""
    command = getattr(import_module(f"server.cli.commands.{name}"), name)
    parent = typer.Typer()
    if isinstance(command, typer.Typer):
        parent.add_typer(command, name=name)
    else:
        parent.command()(command)
    loaded = get_group(parent).commands[name]
    assert isinstance(loaded, TyperCommand | TyperGroup)
    return loaded


def main() -> None:
    """The entry point. An error of our tree is one sentence on stderr and status 1."""
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
    """Options of `polypeft` itself."""
