"""An alias's target: one version number, or several with weights. No I/O.

Its text form, in Valkey and its scripts: "3", or "3:0.9,4:0.1".
"""

import hashlib
import math
from collections.abc import Mapping

from adapters_store.names import MAX_VERSION, version_number
from server.errors import InvalidField, shown

AliasTarget = int | dict[int, float]

MAX_WEIGHTS = 10
MAX_WEIGHT = 1000.0


def to_text(target: AliasTarget) -> str:
    if isinstance(target, int):
        return str(target)
    return ",".join(f"{version}:{weight!r}" for version, weight in sorted(target.items()))


def from_text(text: str) -> AliasTarget:
    if ":" not in text:
        return int(text)
    pairs = (pair.split(":") for pair in text.split(","))
    return {int(version): float(weight) for version, weight in pairs}


def check_weights(weights: Mapping[str, float]) -> AliasTarget:
    """`weights` by version number. They are relative: 9 and 1 mean 0.9 and 0.1. Raises InvalidField."""
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise InvalidField(
            f"weights must name 1 to {MAX_WEIGHTS} versions, not {len(weights)}.", param="weights"
        )
    target: dict[int, float] = {}
    for selector, weight in weights.items():
        version = version_number(selector)
        if version is None or not 1 <= version <= MAX_VERSION:
            raise InvalidField(
                f"weights has the key {shown(selector)}, which is no version number.", param="weights"
            )
        if version in target:
            raise InvalidField(f"weights names version {version} twice.", param="weights")
        if not 0 < weight <= MAX_WEIGHT:  # refuses NaN, too
            raise InvalidField(
                f"weights.{version} must be over 0 and at most {MAX_WEIGHT:g}, not {shown(weight)}.",
                param="weights",
            )
        target[version] = float(weight)
    return next(iter(target)) if len(target) == 1 else target


def heaviest(target: AliasTarget) -> int:
    """The version of the largest weight; among equal weights, the newest."""
    return target if isinstance(target, int) else max(target, key=lambda version: (target[version], version))


def pick(target: AliasTarget, sticky: str) -> int:
    """The version for the caller `sticky`, a pure function of it and the weights.

    Weighted rendezvous hashing: a version's score is weight / -log(hash), and the highest score wins. So a
    change of weights moves no more callers than the new shares require.
    """
    if isinstance(target, int):
        return target
    return max(target, key=lambda version: target[version] / -math.log(_uniform(version, sticky)))


def _uniform(version: int, sticky: str) -> float:
    """A hash, uniform in the open interval (0, 1)."""
    digest = hashlib.sha256(f"{version}\0{sticky}".encode("utf-8", "surrogatepass")).digest()
    return (int.from_bytes(digest[:6]) + 0.5) / 2**48
