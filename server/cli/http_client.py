"""HTTP client of the commands: the server's URL, the key to send, and its error answers as our exceptions."""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from server.errors import (
    InvalidField,
    PolypeftError,
    Unauthenticated,
    Unavailable,
    error_from_code,
    shown,
)
from server.settings import Settings

Url = Annotated[str, typer.Option("--url", envvar="POLYPEFT_URL", help="Where the server is.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="POLYPEFT_API_KEY",
        help="An API key. Without it: the operator's, out of POLYPEFT_ADMIN_KEY_FILE or DATA_DIR/admin.key.",
    ),
]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Where admin.key lies.", show_default="data")
]

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # checks of uploads and long answers take minutes


@contextmanager
def connection(url: str, key: str | None, data_dir: Path | None) -> Iterator[httpx.Client]:
    """A client that sends the key. Raises Unavailable when the server cannot be reached, InvalidField."""
    headers = {"Authorization": f"Bearer {key or _operator_key(data_dir)}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise Unavailable(f"The server at {url} cannot be reached: {reason}.") from error
    except UnicodeEncodeError as error:  # bytes on the command line that are not UTF-8
        raise InvalidField(f"{shown(error.object[error.start : error.end])} cannot be sent.") from None


def answer(response: httpx.Response) -> Any:
    """The JSON of a successful answer. Raises the error of any other, with the server's own sentence."""
    if response.is_success:
        try:
            return response.json()
        except ValueError:
            raise Unavailable(f"{response.url} does not answer as a Polypeft server does.") from None
    raise refusal(response.read(), f"The server answered {response.status_code}.")


def base_id(client: httpx.Client) -> str:
    """The id of the server's base model."""
    models = answer(client.get("/v1/models"))["data"]
    return str(next(model["id"] for model in models if not model.get("parent")))


def refusal(body: bytes | str, default_sentence: str) -> PolypeftError:
    """The error in an OpenAI error object; for any other body Unavailable with `default_sentence`."""
    try:
        error = json.loads(body)["error"]
        return error_from_code(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):  # not from a Polypeft server: a proxy's page, perhaps
        return Unavailable(default_sentence)


def pages(client: httpx.Client, path: str, **params: str) -> Iterator[dict[str, Any]]:
    """All objects of a list, fetched page by page."""
    while True:
        page = answer(client.get(path, params=params))
        yield from page["data"]
        if not page["has_more"]:
            return
        params["after"] = page["last_id"]


def options_to_reach(url: str, data_dir: Path | None = None) -> str:
    """The options by which another command reaches this server, where they are not the defaults."""
    options = f" --url {shlex.quote(url)}" if url != DEFAULT_URL else ""
    return options + (f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else "")


def _operator_key(data_dir: Path | None) -> str:
    path = data_dir / "admin.key" if data_dir else Settings().operator_key_path
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise Unauthenticated(
            f"Give a key with --key or POLYPEFT_API_KEY: the operator's, {str(path)!r}, cannot be read."
        ) from None
