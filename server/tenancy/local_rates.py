"""Rate limits without Valkey, for one process: the rule of rate_limits_lua.py by the process's own clock."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from server.tenancy.limits import Limits

FULL_SECONDS = 60.0  # until an empty bucket is full: limits are a minute's
MAX_BUCKETS = 1000  # more are looked through for those that are full again
Refusal = Literal["size", "requests", "tokens", "concurrent"]


class Verdict(NamedTuple):
    """A decision on one request, and what its tenant has left after it."""

    refused: Refusal | None  # by which limit; size: larger than a whole bucket of tokens
    requests: float  # left; of no meaning without such a limit
    tokens: float
    running: int  # requests at once, this one included if it is admitted
    wait: float  # seconds until buckets hold enough for it


@dataclass
class _Bucket:
    at: float
    requests: float
    tokens: float


class LocalRates:
    """Each tenant's buckets; full when it first comes."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._buckets: dict[str, _Bucket] = {}

    def admit(self, tenant: str, limits: Limits, tokens: int, running: int) -> Verdict:
        """Take one request and `tokens`, or nothing. `running`: requests of the tenant beside this one."""
        max_requests, max_tokens = limits.requests_per_minute, limits.tokens_per_minute
        bucket = self._refilled(tenant, max_requests or 0, max_tokens or 0)
        refused, wait = _decide(bucket, limits, tokens, running)
        if refused is None:
            bucket.requests -= 1
            bucket.tokens -= tokens
            running += 1
        return Verdict(refused, bucket.requests, bucket.tokens, running, wait)

    def give_back(self, tenant: str, tokens: float) -> None:
        """Return what a request did not use, if the tenant has been here."""
        if bucket := self._buckets.get(tenant):
            bucket.tokens += tokens  # the next refill cuts it to what the bucket holds

    def _refilled(self, tenant: str, max_requests: int, max_tokens: int) -> _Bucket:
        now = self._now()
        if len(self._buckets) > MAX_BUCKETS:
            late = now - FULL_SECONDS
            self._buckets = {key: bucket for key, bucket in self._buckets.items() if bucket.at > late}
        bucket = self._buckets.setdefault(tenant, _Bucket(now, max_requests, max_tokens))
        share = max(0.0, now - bucket.at) / FULL_SECONDS
        bucket.requests = min(max_requests, bucket.requests + share * max_requests)
        bucket.tokens = min(max_tokens, bucket.tokens + share * max_tokens)
        bucket.at = now
        return bucket


def _decide(bucket: _Bucket, limits: Limits, tokens: int, running: int) -> tuple[Refusal | None, float]:
    """Which limit refuses, the one with the longest wait, and the wait in seconds."""
    max_requests, max_tokens = limits.requests_per_minute, limits.tokens_per_minute
    if max_tokens is not None and tokens > max_tokens:
        return "size", 0.0
    waits: dict[Refusal, float] = {}
    if max_requests is not None:
        waits["requests"] = (1 - bucket.requests) * FULL_SECONDS / max_requests
    if max_tokens is not None:
        waits["tokens"] = (tokens - bucket.tokens) * FULL_SECONDS / max_tokens
    refused = max(waits, key=lambda name: waits[name], default=None)
    if refused is not None and waits[refused] > 0:
        return refused, waits[refused]
    if limits.concurrent_requests is not None and running >= limits.concurrent_requests:
        return "concurrent", 0.0
    return None, 0.0
