"""API keys: 256 random bits behind a prefix, kept only as SHA-256. Knows no tenant.

A slow hash would add nothing at this entropy; a stolen database yields no key either way.
"""

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from server.errors import StartupError

PREFIX = "pp-"
BYTES = 32
LENGTH = len(PREFIX) + 43  # 32 bytes in URL-safe base64 without padding


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


def operator_key(data_dir: Path) -> tuple[str, bool]:
    """The operator's key, and whether this call made it.

    It lies in `data_dir`/admin.key, readable by its owner alone, and appears whole or not at all: of
    several processes that start at once, one makes it and the others read that one's.
    """
    path = data_dir / "admin.key"
    try:
        created = not path.exists() and _create_once(path, new_secret())
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError("admin.key in the data directory can be neither read nor made.") from error
    if not well_formed(secret):
        raise StartupError("admin.key in the data directory holds no key; remove it to get a new one.")
    return secret, created


def _create_once(path: Path, secret: str) -> bool:
    """Write a new file of mode 0600 durably; False if somebody else was first."""
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
        return False
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True
