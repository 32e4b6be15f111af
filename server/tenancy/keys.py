"""API keys: 256 random bits behind a prefix, kept only as SHA-256. Knows no tenant.

A slow hash would add nothing at this entropy; a stolen database yields no key either way.
"""

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from server.errors import StartupError
from server.settings import Settings

PREFIX = "pp-"
BYTES = 32
LENGTH = len(PREFIX) + 43  # 32 bytes in URL-safe base64 without padding
MIN_OPERATOR_KEY_CHARS, MAX_OPERATOR_KEY_CHARS = 32, 1024  # of one that was not made here
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def new_secret() -> str:
    return PREFIX + secrets.token_urlsafe(BYTES)


def well_formed(secret: str) -> bool:
    """Whether `secret` could be a key of ours. Anything else is refused before it is hashed or looked up."""
    return len(secret) == LENGTH and secret.isascii() and secret.startswith(PREFIX)


def fingerprint(secret: str) -> str:
    """What is stored in place of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def same_secret(given: str, expected: str) -> bool:
    """Compare in time that depends on neither: any text may be given, of any length."""
    hashes = (hashlib.sha256(s.encode("utf-8", "surrogatepass")).digest() for s in (given, expected))
    return hmac.compare_digest(*hashes)


def operator_key(settings: Settings) -> str:
    """The operator's key, out of `admin_key_file` or else out of admin.key in the data directory.

    The latter is made where there is none, readable by its owner alone, and appears whole or not at all: of
    several processes that start at once, one makes it and the others read that one's. Raises StartupError for
    a file that cannot be read, that others may write, or that holds no key.
    """
    path = settings.operator_key_path
    if settings.admin_key_file is None:
        try:
            if not path.exists():
                _create_once(path, new_secret())
        except OSError as error:
            raise StartupError("admin.key in the data directory cannot be made.") from error
        return _read_operator_key(path, "admin.key in the data directory")
    return _read_operator_key(path, f"--admin-key-file {str(path)!r}")


def _read_operator_key(path: Path, called: str) -> str:
    """Who may read it is not asked: secrets are mounted so that every user of a container may."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise StartupError(f"{called} is not a file.", param="admin_key_file")
        with path.open("rb") as file:
            content = file.read(MAX_OPERATOR_KEY_CHARS + 2)
    except OSError as error:
        raise StartupError(f"{called} cannot be read: {error.strerror}.", param="admin_key_file") from error
    if mode & OTHERS_MAY_WRITE:
        rule = f"can be changed by others, its mode is {stat.S_IMODE(mode):04o}: chmod go-w it"
        raise StartupError(f"{called} {rule}.", param="admin_key_file")
    key = content.strip()
    fits = MIN_OPERATOR_KEY_CHARS <= len(key) <= MAX_OPERATOR_KEY_CHARS
    if not fits or not all(0x20 < char < 0x7F for char in key):
        rule = f"one line of {MIN_OPERATOR_KEY_CHARS} to {MAX_OPERATOR_KEY_CHARS} printable ASCII characters"
        raise StartupError(f"{called} holds no key: {rule} without a space.", param="admin_key_file")
    return key.decode("ascii")


def _create_once(path: Path, secret: str) -> None:
    """Write a new file of mode 0600 durably, unless somebody else was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secret + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
