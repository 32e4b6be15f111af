"""Files of a Debian package: those installed, or else fetched by apt into .cache, as any user may."""

import subprocess
from pathlib import Path

from server.base_model.atomic_folders import build_once

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "debian"


def package_folder(package: str, inside: str) -> Path:
    """The folder `inside` ("usr/share/...") of a package. Raises CalledProcessError where apt has none."""
    installed = Path("/") / inside
    if installed.is_dir():
        return installed

    def unpack(staging: Path) -> None:
        subprocess.run(["apt-get", "download", package], cwd=staging, check=True, capture_output=True)
        for archive in staging.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", archive, staging], check=True)
            archive.unlink()

    return build_once(CACHE / package, unpack) / inside
