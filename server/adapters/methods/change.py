"""One site, changed affinely."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Change:
    """What an adapter does at one site; absent parts do nothing.

    a [r, in] (of an embedding [vocabulary, r], so that a token's row is contiguous), b [r, out],
    gain [out], bias [out]. scale [in], upon the inputs, is for banks that have the hook for it.
    norm [1 or 2, out]: a norm's own weight, and its bias if it has one, in the place of the base's.
    Until it is packed b may lack a `factor`; in a bank all scalings are folded in. Matrices may be narrower
    than what they are multiplied with.
    """

    site: str
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    factor: float = 1.0
