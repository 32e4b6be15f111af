"""`polypeft serve`: the whole system on this machine. Its options are the Settings, read off the class."""

import inspect
import types
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape

from server.cli.connection import base_id, connection
from server.errors import StartupError, shown
from server.logs import configure_logs
from server.settings import Settings

INTERNAL = {"supervisor_pid"}  # between `serve` and its children
WELCOME = """
{model} is ready at {url}/v1

  make a tenant, whose key is shown once:

    polypeft tenants add acme{options}

  and ask with that key:

    curl {url}/v1/chat/completions -H "Authorization: Bearer $KEY" \\
      -H "Content-Type: application/json" \\
      -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
"""


def serve(**given: str | bool | None) -> None:
    """Start Valkey, engine and API as one, and stop them as one. Every option is also POLYPEFT_<OPTION>."""
    from server.base.resolve import resolve_model  # these load more than the other commands should wait for
    from server.supervisor import serve as run
    from server.tenancy.keys import operator_key

    settings = read_settings(given)
    configure_logs(settings, "serve")
    settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    resolve_model(settings)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    key, created = operator_key(settings.data_dir)
    if created:
        console.print(
            f"The operator's key, kept in {settings.data_dir / 'admin.key'} and shown this once:\n\n  {key}"
        )

    loading = Console(stderr=True).status(f"Loading {settings.model}")

    def welcome(url: str) -> None:
        loading.stop()
        with connection(url, key, None) as client:
            model = base_id(client)
        console.print(WELCOME.format(model=model, url=url, options=_options_to_reach(settings, url)))

    with loading:
        run(settings, welcome)


def read_settings(given: dict[str, Any]) -> Settings:
    """Options over environment over defaults. Raises StartupError, naming the first option at fault."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        raise StartupError(f"{_flag(name)} {shown(fault['input'])}: {fault['msg']}.", param=name) from None


def _options_to_reach(settings: Settings, url: str) -> str:
    """What other commands must be told, where this server does not run with the defaults."""
    default = Settings.model_construct()
    options = f" --url {url}" if settings.port != default.port else ""
    return options + (f" --data-dir {settings.data_dir}" if settings.data_dir != default.data_dir else "")


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """The option of one setting. Its text goes to Settings as it is: values are checked in one place."""
    flag = f"{_flag(name)}/--no-{name.replace('_', '-')}" if field.annotation is bool else _flag(name)
    kind = bool if field.annotation is bool else str
    default = "" if field.default is None else f" Default: {field.default}."
    option = typer.Option(
        flag,
        help=escape(f"{field.description}{default}"),
        metavar=None if kind is bool else _metavar(field.annotation),
        show_default=False,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _metavar(annotation: Any) -> str:
    """`a|b` for a choice, otherwise the type's name; "or None" is said by the missing default."""
    if get_origin(annotation) is types.UnionType:
        annotation = get_args(annotation)[0]
    choices = get_args(annotation)
    return "|".join(map(str, choices)) if choices else annotation.__name__.upper()


# typer reads options off a function's signature; this one's is the Settings class
serve.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [_parameter(name, field) for name, field in Settings.model_fields.items() if name not in INTERNAL]
)
