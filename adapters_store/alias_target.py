"""What an alias points at: one version, or several by weight. No I/O.

As text, which is how Valkey keeps it and its scripts read it: "3", or "3:0.9,4:0.1".
"""

import hashlib
import math
from collections.abc import Mapping

from adapters_store.names import MAX_VERSION, version_number
from server.errors import InvalidField, shown

AliasTarget = int | dict[int, float]

MAX_WEIGHTS = 10
MAX_WEIGHT = 1000.0


def to_text(points: AliasTarget) -> str:
    if isinstance(points, int):
        return str(points)
    return ",".join(f"{version}:{weight!r}" for version, weight in sorted(points.items()))


def from_text(text: str) -> AliasTarget:
    if ":" not in text:
        return int(text)
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(version): float(weight) for version, weight in pairs}


def check_weights(given: Mapping[str, float]) -> AliasTarget:
    """`given` by version number. They are relative: 9 and 1 say what 0.9 and 0.1 do. Raises InvalidField."""
    if not 1 <= len(given) <= MAX_WEIGHTS:
        raise InvalidField(
            f"weights must name 1 to {MAX_WEIGHTS} versions, not {len(given)}.", param="weights"
        )
    found: dict[int, float] = {}
    for selector, weight in given.items():
        version = version_number(selector)
        if version is None or not 1 <= version <= MAX_VERSION:
            raise InvalidField(
                f"weights has the key {shown(selector)}, which is no version number.", param="weights"
            )
        if version in found:
            raise InvalidField(f"weights names version {version} twice.", param="weights")
        if not 0 < weight <= MAX_WEIGHT:  # not of NaN either
            raise InvalidField(
                f"weights.{version} must be over 0 and at most {MAX_WEIGHT:g}, not {shown(weight)}.",
                param="weights",
            )
        found[version] = float(weight)
    return next(iter(found)) if len(found) == 1 else found


def heaviest(points: AliasTarget) -> int:
    """Of equal weights, the newest."""
    return points if isinstance(points, int) else max(points, key=lambda version: (points[version], version))


def pick(points: AliasTarget, sticky: str) -> int:
    """The version for whoever `sticky` stands for: always the same one while the weights stay.

    Weighted rendezvous: each version draws a lot for `sticky`, of which its weight alone makes a score. So
    weights that change from w to w' move exactly the share of callers that they have to.
    """
    if isinstance(points, int):
        return points
    return max(points, key=lambda version: points[version] / -math.log(_lot(version, sticky)))


def _lot(version: int, sticky: str) -> float:
    """Over 0 and under 1, evenly."""
    digest = hashlib.sha256(f"{version}\0{sticky}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / 2**48
