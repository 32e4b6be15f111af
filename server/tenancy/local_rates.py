"""Rate limits without Valkey, for one process: the rule of rate_limits_lua.py by the process's own clock.

The process has an equal share of each limit, by the number of processes that were there last. It begins with
its share of what Valkey said last was left, so that all processes together admit what Valkey would have.
"""

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from server.tenancy.limits import Allowance, RequestLimits
from server.tenancy.verdict import Left, Refusal, Verdict, verdict_of

FULL_SECONDS = 60.0  # until an empty bucket is full: limits are a minute's
MAX_BUCKETS = 10_000  # of the allowances that came last; one that is forgotten begins with its share again


@dataclass
class _Bucket:
    at: float
    requests: float
    tokens: float
    shared: bool = False  # as Valkey said: for all processes


class LocalRates:
    """The buckets of each allowance."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.processes = 1
        self._now = now
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # the one that came last is the last

    def learn(self, allowance: Allowance, left: Left) -> None:
        """What Valkey says is left for all processes."""
        self._keep(allowance.id, _Bucket(self._now(), left.requests, left.tokens, shared=True))

    def admit(
        self, allowances: list[Allowance], tokens: int, running: list[int], waiting: int = 0
    ) -> Verdict:
        """Take one request and `tokens` of each allowance, or nothing. Of this process: `running`, requests
        of each beside this one, and `waiting`, tokens of the tenant's requests that have none yet.
        """
        buckets = [self._refilled(allowance) for allowance in allowances]
        refused, by, wait = self._refusal(allowances, buckets, tokens, running)
        queued = allowances[0].limits.queued
        if refused is None and queued is not None and waiting > 0 and waiting + tokens > self._part(queued):
            refused = "queued"
        if refused is None:
            for bucket in buckets:
                bucket.requests -= 1
                bucket.tokens -= tokens
            running = [count + 1 for count in running]
        left = [Left(b.requests, b.tokens, count) for b, count in zip(buckets, running, strict=True)]
        return verdict_of(allowances, left, refused, by, wait, waiting)

    def give_back(self, allowances: list[Allowance], tokens: float) -> None:
        """Return what a request did not use, to allowances that have been here."""
        for allowance in allowances:
            bucket = self._buckets.get(allowance.id)
            if bucket is not None and not bucket.shared:
                bucket.tokens += tokens  # the next refill cuts it to what the bucket holds

    def _refilled(self, allowance: Allowance) -> _Bucket:
        limits, now = allowance.limits, self._now()
        max_requests, max_tokens = limits.requests_per_minute or 0, limits.tokens_per_minute or 0
        bucket = self._buckets.get(allowance.id) or _Bucket(now, max_requests, max_tokens, shared=True)
        if bucket.shared:  # nobody is refused for good: one request is a share of any
            whole = math.ceil(max(0, math.floor(bucket.requests)) / self.processes)
            bucket = _Bucket(bucket.at, whole, bucket.tokens / self.processes)
        minutes = max(0.0, now - bucket.at) / FULL_SECONDS / self.processes
        bucket.requests = min(max_requests, bucket.requests + minutes * max_requests)
        bucket.tokens = min(max_tokens, bucket.tokens + minutes * max_tokens)
        bucket.at = now
        self._keep(allowance.id, bucket)
        return bucket

    def _keep(self, id_: str, bucket: _Bucket) -> None:
        self._buckets[id_] = bucket
        self._buckets.move_to_end(id_)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)

    def _part(self, limit: int) -> int:
        return math.ceil(limit / self.processes)

    def _refusal(
        self, allowances: list[Allowance], buckets: list[_Bucket], tokens: int, running: list[int]
    ) -> tuple[Refusal | None, int, float]:
        """Which limit of which allowance refuses, the one with the longest wait, and the wait in seconds."""
        found: tuple[Refusal | None, int, float] = (None, 0, 0.0)
        for index, (allowance, bucket, count) in enumerate(zip(allowances, buckets, running, strict=True)):
            limits = allowance.limits
            if limits.tokens_per_minute is not None and tokens > limits.tokens_per_minute:
                return "size", index, 0.0
            for refused, wait in self._waits(limits, bucket, tokens).items():
                if wait > found[2]:
                    found = refused, index, wait
            at_once = limits.concurrent_requests
            if found[0] is None and at_once is not None and count >= self._part(at_once):
                found = "concurrent", index, 0.0
        return found

    def _waits(self, limits: RequestLimits, bucket: _Bucket, tokens: int) -> dict[Refusal, float]:
        """Seconds until a bucket holds enough, by limit."""
        seconds = FULL_SECONDS * self.processes
        waits: dict[Refusal, float] = {}
        if limits.requests_per_minute is not None:
            waits["requests"] = (1 - bucket.requests) * seconds / limits.requests_per_minute
        if limits.tokens_per_minute is not None:
            waits["tokens"] = (tokens - bucket.tokens) * seconds / limits.tokens_per_minute
        return waits
