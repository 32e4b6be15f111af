"""Names of adapters and aliases, and the object keys that are built from them. No I/O.

    tenants/{tenant}/blobs/{sha256}.{token}                bytes, written first; the key is never reused
    tenants/{tenant}/adapters/{name}/{version:08d}.json    manifest, written last
    tenants/{tenant}/deleted/{name}/{version:08d}.json     deletion mark, while that version is deleted

A valid name is safe as a segment of a key and as a word of a message.
"""

import hashlib
from string import ascii_letters, digits
from typing import NamedTuple

from server.errors import InvalidField, shown

MAX_NAME = 64
MAX_VERSION = 99_999_999
LATEST = "latest"
TENANTS = "tenants"

_FIRST_CHARACTERS = frozenset(ascii_letters + digits)
_CHARACTERS = _FIRST_CHARACTERS | frozenset("._-")


class ManifestKey(NamedTuple):
    tenant: str
    name: str
    version: int


def is_name(text: str) -> bool:
    return (
        0 < len(text) <= MAX_NAME
        and text[0] in _FIRST_CHARACTERS
        and all(c in _CHARACTERS for c in text)
        and ".." not in text
    )


def adapter_name(text: str) -> str:
    """`text` if it is a name; else one that is made of it, always the same: in small letters, with hyphens
    for what a name cannot hold; of a text without letters or digits for a name, by its hash.
    """
    if is_name(text):
        return text
    words = "".join(c if c in _FIRST_CHARACTERS else " " for c in text.lower()).split()
    return "-".join(words)[:MAX_NAME] or f"ft-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def is_file_name(text: str, max_length: int) -> bool:
    """Whether it is printable and without a path: it is displayed, and suggested at a download."""
    return 0 < len(text) <= max_length and text.isprintable() and not set(text) & set("/\\")


def check_name(text: str, param: str = "name") -> str:
    """`text`, if it is a valid name of an adapter or an alias. Raises InvalidField."""
    if not is_name(text):
        raise InvalidField(
            f"{param} {shown(text)} must have 1 to {MAX_NAME} letters, digits, '.', '_' or '-', begin with a "
            "letter or a digit, and hold no '..'.",
            param=param,
        )
    return text


def check_alias(text: str) -> str:
    """`text`, if it is a valid alias; a version number is not. Raises InvalidField."""
    check_name(text, "alias")
    if version_number(text) is not None:
        raise InvalidField(f"alias {shown(text)} reads as a version number.", param="alias")
    return text


def version_number(selector: str) -> int | None:
    """3 for "3" and "v3"; None for anything else."""
    number = selector.removeprefix("v")
    if not number or len(number) > len(str(MAX_VERSION)) or any(c not in digits for c in number):
        return None
    return int(number)


def blob_key(tenant: str, sha256: str, token: str = "") -> str:
    """A random `token` makes the key unique to one upload."""
    return f"{TENANTS}/{tenant}/blobs/{sha256}{'.' if token else ''}{token}"


def blob_tenant(key: str) -> str | None:
    """The tenant of the blob at `key`; None if `key` is no blob's."""
    match key.split("/"):
        case [root, tenant, "blobs", _file] if root == TENANTS:
            return tenant
    return None


def manifest_prefix(tenant: str, name: str) -> str:
    return f"{TENANTS}/{tenant}/adapters/{name}/"


def manifest_key(tenant: str, name: str, version: int) -> str:
    return f"{manifest_prefix(tenant, name)}{version:08d}.json"


def deleted_key(tenant: str, name: str, version: int) -> str:
    return f"{TENANTS}/{tenant}/deleted/{name}/{version:08d}.json"


def parse_manifest_key(key: str) -> ManifestKey | None:
    """The version whose manifest is at `key`; None if `key` is no manifest's."""
    match key.split("/"):
        case [root, tenant, "adapters", name, file] if root == TENANTS:
            version = version_number(file.removesuffix(".json")) if file.endswith(".json") else None
            return None if version is None else ManifestKey(tenant, name, version)
    return None
