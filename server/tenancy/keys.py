"""API keys: 256 random bits behind a prefix, stored only as SHA-256. Knows no tenant.

A slow hash adds nothing at this entropy: a stolen database yields no key either way. `fingerprint` is the
hash; another one makes all stored keys void (pp:keys in tenants.py), and moves users between the versions of
weighted aliases (`sticky_key` in api/http/dependencies.py).
"""

import hashlib
import hmac
import secrets
import stat
from pathlib import Path

from server.atomic_files import write_file
from server.errors import StartupError
from server.settings import Settings

PREFIX = "pp-"
SECRET_BYTES = 32
KEY_LENGTH = len(PREFIX) + 43  # 32 bytes in URL-safe base64 without padding
MIN_OPERATOR_KEY_CHARS, MAX_OPERATOR_KEY_CHARS = 32, 1024  # of a key that the operator chose
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def well_formed(secret: str) -> bool:
    """Whether `secret` has the form of our keys. Others are refused before they are hashed or looked up."""
    return len(secret) == KEY_LENGTH and secret.isascii() and secret.startswith(PREFIX)


def fingerprint(secret: str) -> str:
    """SHA-256 in hexadecimal, which is stored in place of the secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def same_secret(candidate: str, expected: str) -> bool:
    """Compare in constant time; `candidate` may be any text of any length."""
    hashes = (hashlib.sha256(s.encode("utf-8", "surrogatepass")).digest() for s in (candidate, expected))
    return hmac.compare_digest(*hashes)


def operator_key(settings: Settings) -> str:
    """The operator's key, from `admin_key_file`, or else from admin.key in the data directory.

    The latter is created if missing, atomically and readable by its owner alone: of several processes that
    start at once, one creates it and the others read it. Raises StartupError for a file that cannot be read,
    that other users can write, or that holds no key.
    """
    path = settings.operator_key_path
    if settings.admin_key_file is None:
        try:
            if not path.exists():
                write_file(path, [f"{new_secret()}\n".encode()], only_if_absent=True, mode=0o600)
        except OSError as error:
            raise StartupError("admin.key in the data directory cannot be made.") from error
        return _read_operator_key(path, "admin.key in the data directory")
    return _read_operator_key(path, f"--admin-key-file {str(path)!r}")


def _read_operator_key(path: Path, description: str) -> str:
    """Read permissions are not checked: mounted secrets are readable by every user of a container."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise StartupError(f"{description} is not a file.", param="admin_key_file")
        with path.open("rb") as file:
            content = file.read(MAX_OPERATOR_KEY_CHARS + 2)
    except OSError as error:
        raise StartupError(
            f"{description} cannot be read: {error.strerror}.", param="admin_key_file"
        ) from error
    if mode & WRITABLE_BY_OTHERS:
        rule = f"can be changed by others, its mode is {stat.S_IMODE(mode):04o}: chmod go-w it"
        raise StartupError(f"{description} {rule}.", param="admin_key_file")
    key = content.strip()
    fits = MIN_OPERATOR_KEY_CHARS <= len(key) <= MAX_OPERATOR_KEY_CHARS
    if not fits or not all(0x20 < char < 0x7F for char in key):
        rule = f"one line of {MIN_OPERATOR_KEY_CHARS} to {MAX_OPERATOR_KEY_CHARS} printable ASCII characters"
        raise StartupError(f"{description} holds no key: {rule} without a space.", param="admin_key_file")
    return key.decode("ascii")
