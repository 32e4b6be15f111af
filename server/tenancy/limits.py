"""A tenant's limits: the record, the server's defaults, and which of both is in force. Knows no storage.

A further limit is a field of `Limits`, and of LimitsBody (api/routes/admin/limits.py) and `polypeft tenants
limits` (cli/commands/tenants.py), which set it; its default, if it has one, is an option of settings.py. What
counts requests and tokens is decided in rate_limits.py and its Lua, and answered by api/http/rate_limits.py.
"""

from typing import Self

import msgspec

from server.messages import Priority
from server.settings import Settings


class Limits(msgspec.Struct, frozen=True, omit_defaults=True):
    """None: as the server's default has it; among defaults and what is in force: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # of prompts, and of answers as reserved
    concurrent_requests: int | None = None
    max_context: int | None = None  # tokens of prompt and answer together
    max_n: int | None = None  # choices of a request
    priority: Priority | None = None  # the most urgent class that its requests may have

    @classmethod
    def defaults(cls, settings: Settings) -> Self:
        """What holds for every tenant that has nothing else. The longest context is the base's."""
        return cls(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            concurrent_requests=settings.concurrent_requests,
            max_n=settings.max_n,
        )

    def over(self, defaults: "Limits") -> "Limits":
        """What is in force: these, and `defaults` where these are None."""
        own = {name: value for name, value in msgspec.structs.asdict(self).items() if value is not None}
        return msgspec.structs.replace(defaults, **own)

    @property
    def limits_rates(self) -> bool:
        """Whether a request has to be counted."""
        rates = (self.requests_per_minute, self.tokens_per_minute, self.concurrent_requests)
        return any(rate is not None for rate in rates)


NO_LIMITS = Limits()
