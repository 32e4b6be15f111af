"""A record of the ledger, and the amounts by which it changes the sums. Plain data."""

from typing import Literal, NamedTuple

import msgspec

SECONDS_A_DAY = 86_400
OPEN, COMPLETED, CANCELLED, CUT = "", "completed", "cancelled", "cut"
Kind = Literal["request", "load"]


class Amounts(NamedTuple):
    """What the ledger sums, in the order in which Valkey keeps it: new ones come last. Times are in ms."""

    requests: int = 0  # however they ended
    failed_requests: int = 0
    cancelled_requests: int = 0  # the client left, or the API process was killed
    prompt_tokens: int = 0  # cached ones included
    cached_tokens: int = 0
    generated_tokens: int = 0
    request_ms: int = 0
    loads: int = 0  # of adapters, that succeeded
    failed_loads: int = 0
    load_bytes: int = 0
    load_ms: int = 0
    jobs: int = 0  # of fine-tuning, however they ended
    failed_jobs: int = 0
    cancelled_jobs: int = 0
    training_tokens: int = 0
    training_ms: int = 0

    def plus(self, other: "Amounts") -> "Amounts":
        return Amounts(*(mine + its for mine, its in zip(self, other, strict=True)))


class Group(NamedTuple):
    """What the sums of a tenant's day are kept by."""

    adapter: str  # name@version, several joined by "+"; "": the base
    key: str  # the key's id; "" if no key asked for it

    @property
    def field(self) -> str:
        """Its field in Valkey; neither part has a space."""
        return f"{self.adapter} {self.key}"


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of a journal. A request that runs has the outcome OPEN."""

    id: str
    kind: Kind
    number: int  # 1, 2, ... of those that ended, in their journal; OPEN: the last one before it
    at: float  # Unix seconds of its end, or of this state
    tenant: str
    key: str = ""
    adapter: str = ""
    outcome: str = OPEN  # COMPLETED, CANCELLED, CUT, or an error's code
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    @property
    def day(self) -> int:
        """Days since 1970-01-01, UTC."""
        return int(self.at // SECONDS_A_DAY)

    @property
    def group(self) -> Group:
        return Group(self.adapter, self.key)

    @property
    def amounts(self) -> Amounts:
        milliseconds = max(0, round(self.seconds * 1000))
        if self.kind == "load":
            if self.outcome != COMPLETED:
                return Amounts(failed_loads=1)
            return Amounts(loads=1, load_bytes=self.bytes, load_ms=milliseconds)
        cancelled = self.outcome in {CANCELLED, CUT}
        return Amounts(
            requests=1,
            failed_requests=int(not cancelled and self.outcome != COMPLETED),
            cancelled_requests=int(cancelled),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            request_ms=milliseconds,
        )


def adapter_version(name: str, version: int) -> str:
    return f"{name}@{version}"
