"""`polypeft serve`: the whole system on this machine. Its options are generated from Settings."""

import asyncio
import logging
import shlex
from typing import TYPE_CHECKING

from rich.console import Console

from server.cli.http_client import base_id, connection
from server.cli.options import read_settings, signature_of
from server.errors import StartupError, StoreError
from server.logs import configure_logs
from server.settings import Settings

if TYPE_CHECKING:
    from adapters_store.object_store.store import Objects

log = logging.getLogger(__name__)
INTERNAL = {"supervisor_pid", "api_number"}  # settings that `serve` gives its children; no options
WELCOME = """
{model} is ready at {url}/v1

  make a tenant, whose key is shown once:

    polypeft tenants add acme{options}

  and ask with that key:

    curl {url}/v1/chat/completions -H "Authorization: Bearer $KEY" \\
      -H "Content-Type: application/json" \\
      -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
"""


def serve(**options: str | bool | None) -> None:
    """Start Valkey, engine and API as one, and stop them as one. Every option is also POLYPEFT_<OPTION>."""
    # these load more than the other commands should wait for
    from adapters_store.object_store.store import Objects
    from server.base_model.resolve import resolve_model
    from server.supervisor import serve as run
    from server.supervisor.resources import make_data_dir
    from server.tenancy.keys import operator_key

    settings = read_settings(options)
    configure_logs(settings, "serve")
    make_data_dir(settings)
    key = operator_key(settings)
    resolve_model(settings)
    objects = Objects.open(settings.store_url, settings.store_config)
    _check_shared(objects)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"The operator's key lies in {settings.operator_key_path}.")
    loading = Console(stderr=True).status(f"Loading {settings.model}")

    def welcome(url: str) -> None:
        loading.stop()
        with connection(url, key, None) as client:
            model = base_id(client)
        console.print(WELCOME.format(model=model, url=url, options=_options_to_reach(settings, url)))

    with loading:
        run(settings, welcome, prove=lambda url: _prove(objects, url))


def _check_shared(objects: "Objects") -> None:
    """Raise StartupError for a store that several processes cannot share."""
    if not objects.shared:
        raise StartupError(
            "store memory:// is one process's own, and serve runs several; name a folder, file://..."
        )


async def _prove(objects: "Objects", redis_url: str) -> None:
    """Raise StartupError for a store that overwrites, or that belongs to another system than Valkey.

    A store or a Valkey that is away is only logged: cached adapters are served, and children check later.
    """
    from adapters_store.registry.identity import prove_identity
    from adapters_store.valkey import connect

    try:
        await asyncio.to_thread(objects.self_test)
    except StoreError:
        log.warning("The object store does not answer; what needs it will fail until it does")
    redis = connect(redis_url)
    try:
        await prove_identity(redis, objects)
    except StoreError as error:
        log.warning("Whether store and Valkey belong together is looked at later: %s", error.message)
    finally:
        await redis.aclose()


def _options_to_reach(settings: Settings, url: str) -> str:
    """The options by which other commands reach this server, where its settings are not the defaults."""
    default = Settings.model_construct()
    options = f" --url {url}" if settings.port != default.port else ""
    if settings.admin_key_file is not None:
        return f'{options} --key "$(cat {shlex.quote(str(settings.admin_key_file))})"'
    return options + (f" --data-dir {settings.data_dir}" if settings.data_dir != default.data_dir else "")


# typer generates options from the function's signature, which is made from the Settings class
serve.__signature__ = signature_of(  # type: ignore[attr-defined]
    [name for name in Settings.model_fields if name not in INTERNAL]
)
