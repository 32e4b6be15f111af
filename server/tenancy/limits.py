"""Limits of a tenant, of its keys and adapters: the records, the server's defaults, and what is in force.

A further limit is a field here, and of a body of api/routes/own_limits.py and an option of `polypeft tenants
limits` (cli/commands/limits.py), which set it; its default, if it has one, is an option of settings.py. What
counts requests and tokens is decided in rate_limits.py and its Lua, and answered by api/http/rate_limits.py;
what is kept or trained, by the registry, the files and the jobs, which ask `LimitRecords.in_force`. Knows no
storage.
"""

from collections.abc import Awaitable, Callable
from typing import NamedTuple, Self, TypeVar

import msgspec

from server.messages import Priority
from server.settings import Settings

LIMITS = "pp:limits"
KEY_LIMITS = f"{LIMITS}:keys"
ADAPTER_LIMITS = f"{LIMITS}:adapters:"  # before a tenant's id
AnyLimits = TypeVar("AnyLimits", bound="RequestLimits")


class RequestLimits(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a tenant, a key and an adapter can each be limited in. None: no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, and of answers as reserved
    concurrent_requests: int | None = None
    max_context: int | None = None  # tokens of prompt and answer together
    max_n: int | None = None  # choices of a request

    @property
    def queued(self) -> int | None:
        """Most tokens of requests that wait for their first token; only tenants have this limit."""
        return None

    @property
    def limits_rates(self) -> bool:
        """Whether a request has to be counted."""
        rates = (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests, self.queued)
        return any(rate is not None for rate in rates)


class Limits(RequestLimits, frozen=True, omit_defaults=True):
    """A tenant's. None: as the server's default has it; among defaults and what is in force: no limit."""

    queued_tokens: int | None = None  # of requests that wait for their first token
    adapters: int | None = None
    adapter_bytes: int | None = None  # of all versions, deleted ones until they are purged
    file_bytes: int | None = None
    jobs: int | None = None  # that have not ended
    training_tokens_per_day: int | None = None
    priority: Priority | None = None  # the most urgent class that its requests may have

    @property
    def queued(self) -> int | None:
        return self.queued_tokens

    @classmethod
    def defaults(cls, settings: Settings) -> Self:
        """What holds for every tenant that has nothing else. The longest context is the base's."""
        return cls(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            concurrent_requests=settings.concurrent_requests,
            max_n=settings.max_n,
            queued_tokens=settings.queued_tokens,
            adapters=settings.max_adapters_per_tenant,
            adapter_bytes=settings.max_adapter_bytes_per_tenant,
            file_bytes=settings.max_files_bytes_per_tenant,
            jobs=settings.max_jobs_per_tenant,
            training_tokens_per_day=settings.training_tokens_per_day,
            priority="interactive",
        )

    def over(self, defaults: "Limits") -> "Limits":
        """What is in force: these, and `defaults` where these are None."""
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(defaults, **own)

    def without_rates(self) -> "Limits":
        """These for the operator's own requests, which are not counted."""
        return msgspec.structs.replace(
            self, **dict.fromkeys(RequestLimits.__struct_fields__), queued_tokens=None
        )


NO_LIMITS = Limits()
LimitsOf = Callable[[str], Awaitable[Limits]]  # what is in force, by tenant


async def unlimited(_tenant: str) -> Limits:
    return NO_LIMITS


def decode_limits(record: bytes | str | None, kind: type[AnyLimits]) -> AnyLimits:
    return kind() if record is None else msgspec.json.decode(record, type=kind)


class Allowance(NamedTuple):
    """Whom limits are for: a tenant, one of its keys or one of its adapters."""

    id: str  # part of Valkey keys
    limits: RequestLimits
    whose: str = ""  # as a refusal says it: " for this key"


def tightest(allowances: list[Allowance], name: str) -> int | None:
    """The smallest limit of this name."""
    values = [getattr(allowance.limits, name) for allowance in allowances]
    return min((value for value in values if value is not None), default=None)
