"""Which adapters can be combined in one request. No torch: the facts come from the cache.

Summed: LoRA and BitFit, each with its weight, computed per token without merging weights. Stacked: a sum of
those, or any one method that acts inside the layers, after one prefix or prompt.
"""

from collections.abc import Sequence

from server.adapters.cache.entries import Resident
from server.messages import Use


def why_not_combinable(uses: Sequence[Use], residents: Sequence[Resident]) -> str | None:
    """Why this combination cannot be served, in a sentence; None if it can."""
    starting = [use for use, resident in zip(uses, residents, strict=True) if resident.virtual_tokens]
    acting = [
        (use, resident) for use, resident in zip(uses, residents, strict=True) if not resident.virtual_tokens
    ]
    if len(starting) > 1:
        names = " and ".join(repr(use.adapter.name) for use in starting[:2])
        return f"adapters holds {names}, which both put virtual tokens first; a request can have one of them."
    for use in starting:
        if use.weight != 1:
            return (
                f"{use.adapter.name!r} ({use.adapter.method}) can have no weight but 1, not {use.weight:g}."
            )
    for use, resident in acting:
        if not resident.summable and (len(acting) > 1 or use.weight != 1):
            return (
                f"{use.adapter.name!r} ({use.adapter.method}) cannot be weighted or added to other adapters; "
                "plain LoRA and BitFit can."
            )
    return None
