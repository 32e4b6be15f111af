"""Names that callers choose, and the object keys made from them. No I/O.

    tenants/{tenant}/blobs/{sha256}.{token}                bytes, written first, under a key used never again
    tenants/{tenant}/adapters/{name}/{version:08d}.json    manifest, written last
    tenants/{tenant}/deleted/{name}/{version:08d}.json     says when that version was deleted, while it is

A name that passes here can be a key's segment and a message's word; nothing else is asked of it.
"""

from string import ascii_letters, digits
from typing import NamedTuple

from server.errors import InvalidField, shown

MAX_NAME = 64
MAX_VERSION = 99_999_999
LATEST = "latest"
TENANTS = "tenants"

_FIRST = frozenset(ascii_letters + digits)
_REST = _FIRST | frozenset("._-")


class ManifestKey(NamedTuple):
    tenant: str
    name: str
    version: int


def is_name(text: str) -> bool:
    return (
        0 < len(text) <= MAX_NAME and text[0] in _FIRST and all(c in _REST for c in text) and ".." not in text
    )


def check_name(text: str, param: str = "name") -> str:
    """`text`, if an adapter or an alias may be called so."""
    if not is_name(text):
        raise InvalidField(
            f"{param} {shown(text)} must have 1 to {MAX_NAME} letters, digits, '.', '_' or '-', begin with a "
            "letter or a digit, and hold no '..'.",
            param=param,
        )
    return text


def check_alias(text: str) -> str:
    """`text`, if it may be an alias: what reads as a version number means that version."""
    check_name(text, "alias")
    if version_number(text) is not None:
        raise InvalidField(f"alias {shown(text)} reads as a version number.", param="alias")
    return text


def version_number(selector: str) -> int | None:
    """3 for "3" and "v3"; None for what is not a version number."""
    number = selector.removeprefix("v")
    if not number or len(number) > len(str(MAX_VERSION)) or any(c not in digits for c in number):
        return None
    return int(number)


def blob_key(tenant: str, sha256: str, token: str = "") -> str:
    """`token` makes it a key that nobody else will ever write, read or remove."""
    return f"{TENANTS}/{tenant}/blobs/{sha256}{'.' if token else ''}{token}"


def blob_tenant(key: str) -> str | None:
    """Whose blob lies at `key`; None for a manifest or anything else."""
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
    """Whose manifest lies at `key`; None for a blob or anything else."""
    return _parse(key, "adapters")


def parse_deleted_key(key: str) -> ManifestKey | None:
    """Which version the mark at `key` calls deleted; None for anything else."""
    return _parse(key, "deleted")


def _parse(key: str, folder: str) -> ManifestKey | None:
    match key.split("/"):
        case [root, tenant, where, name, file] if (root, where) == (TENANTS, folder):
            version = version_number(file.removesuffix(".json")) if file.endswith(".json") else None
            return None if version is None else ManifestKey(tenant, name, version)
    return None
