"""How a command reaches a running server: where it is, whose key it sends, and its refusals as our errors."""

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
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)  # an upload is checked on the device, a model thinks


@contextmanager
def connection(url: str, key: str | None, data_dir: Path | None) -> Iterator[httpx.Client]:
    """A client that sends the key. Raises Unavailable when the server cannot be reached."""
    headers = {"Authorization": f"Bearer {key or _operators_key(data_dir)}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error).rstrip(".") or type(error).__name__
        raise Unavailable(f"The server at {url} cannot be reached: {reason}.") from error
    except UnicodeEncodeError as error:  # bytes on the command line that are no UTF-8
        raise InvalidField(f"{shown(error.object[error.start : error.end])} cannot be sent.") from None


def answer(response: httpx.Response) -> Any:
    """The JSON of a good answer. A refusal is raised as the error it is, with the server's own sentence."""
    if response.is_success:
        try:
            return response.json()
        except ValueError:
            raise Unavailable(f"{response.url} does not answer as a Polypeft server does.") from None
    raise refusal(response.read(), f"The server answered {response.status_code}.")


def base_id(client: httpx.Client) -> str:
    """What the server calls its base model."""
    models = answer(client.get("/v1/models"))["data"]
    return str(next(model["id"] for model in models if not model.get("parent")))


def refusal(body: bytes | str, otherwise: str) -> PolypeftError:
    """The error in OpenAI's error object; `otherwise` is the sentence for a body that holds none."""
    try:
        error = json.loads(body)["error"]
        return error_from_code(str(error["code"]), str(error["message"]))
    except (ValueError, KeyError, TypeError):  # not from our server: a proxy's page, perhaps
        return Unavailable(otherwise)


def pages(client: httpx.Client, path: str, **params: str) -> Iterator[dict[str, Any]]:
    """Everything that a list holds, page by page."""
    while True:
        page = answer(client.get(path, params=params))
        yield from page["data"]
        if not page["has_more"]:
            return
        params["after"] = page["last_id"]


def options_to_reach(url: str, data_dir: Path | None = None) -> str:
    """What another command must be told, where it is not the default."""
    options = f" --url {shlex.quote(url)}" if url != DEFAULT_URL else ""
    return options + (f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else "")


def _operators_key(data_dir: Path | None) -> str:
    path = data_dir / "admin.key" if data_dir else Settings().operator_key_path
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise Unauthenticated(
            f"Give a key with --key or POLYPEFT_API_KEY: the operator's, {str(path)!r}, cannot be read."
        ) from None
