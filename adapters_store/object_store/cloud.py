"""obstore's clients of S3, GCS and Azure, with time-outs, one layer of retries and credentials.

Credentials and endpoint come from the file of `store_config`, or else from the cloud's own variables
(AWS_..., GOOGLE_..., AZURE_...), which obstore reads itself; never from a URL or a command line, where other
users can see them.
"""

import configparser
import json
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from obstore.store import ObjectStore, from_url

from server.errors import StartupError, shown

# A request is given up after `read_timeout` without an answer. That clock starts with the request, so a part
# of an upload must be sent within it, too.
QUICK_TIMEOUTS = {"connect_timeout": timedelta(seconds=5), "read_timeout": timedelta(seconds=10)}
QUICK_SECONDS = 60.0
BULK_TIMEOUTS = {"connect_timeout": timedelta(seconds=5), "read_timeout": timedelta(seconds=30)}
BULK_SECONDS = 600.0  # of a whole transfer
RETRY = {  # the one layer of retries: exponential, capped, with jitter
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=20),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3)},
}
OPTIONS_SET_HERE = frozenset(
    {"bucket", "bucket_name", "prefix", "client_options", "retry_config", "url", "store"}
)


class Clients(NamedTuple):
    """Two clients of the same store: one for small calls, one for transfers."""

    quick: ObjectStore
    bulk: ObjectStore


def open_cloud(url: str, options: dict[str, str]) -> Clients:
    """Opens no connection. Raises what obstore raises."""
    # Without an endpoint of ours, the environment may name one; either way its own scheme decides.
    allow_http = options.get("endpoint", "http://").startswith("http://")
    return Clients(
        *(
            _open(
                url=url,
                client_options=client | {"timeout": timedelta(seconds=seconds), "allow_http": allow_http},
                retry_config=RETRY,
                **options,
            )
            for client, seconds in ((QUICK_TIMEOUTS, QUICK_SECONDS), (BULK_TIMEOUTS, BULK_SECONDS))
        )
    )


def read_options(path: Path) -> dict[str, str]:
    """Options for obstore beside the URL (endpoint, region, credentials), by obstore's names.

    A JSON object of strings, or an INI file of one section. Raises StartupError, which shows no value.
    """
    try:
        text = path.read_text()
        options = _json(text) if text.lstrip().startswith("{") else _ini(text)
    except (OSError, ValueError, configparser.Error):
        raise StartupError(
            f"store_config {shown(path)} must be a JSON object of strings, or an INI file of one section."
        ) from None
    if forbidden := OPTIONS_SET_HERE & options.keys():
        raise StartupError(f"store_config must not set {min(forbidden)}: that is the store's URL's to say.")
    return options


def _json(text: str) -> dict[str, str]:
    options = json.loads(text)
    if not all(isinstance(value, str) for value in options.values()):
        raise ValueError("not a string")
    return dict(options)


def _ini(text: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None)  # a secret may hold a percent sign
    parser.read_string(text)
    sections = [*parser.sections(), *(["DEFAULT"] if parser.defaults() else [])]
    (section,) = sections
    return dict(parser[section])


def _open(**arguments: Any) -> ObjectStore:
    """obstore types `from_url` once per cloud, and only the URL tells which cloud it is."""
    return from_url(**arguments)
