"""A decision on one request, whoever made it: Valkey or, without it, this process."""

from typing import Literal, NamedTuple

from server.tenancy.limits import NO_LIMITS, Allowance, Limits, RequestLimits

Refusal = Literal["size", "requests", "tokens", "concurrent", "queued"]


class Left(NamedTuple):
    """What a allowance has left after a decision."""

    requests: float  # of no meaning without such a limit, and so for tokens
    tokens: float
    running: int  # requests at once, this one included if it is admitted


class Verdict(NamedTuple):
    """The decision, with the numbers of the allowance that refuses, or else of that with the least left."""

    refused: Refusal | None  # by which limit; size: larger than a whole bucket of tokens
    requests: float
    tokens: float
    running: int
    wait: float  # seconds until buckets hold enough for it
    waiting: int = 0  # tokens of the tenant's requests that wait for their first
    limits: RequestLimits = NO_LIMITS  # those that the numbers are of
    whose: str = ""  # a key's or an adapter's, if its limit refuses


def verdict_of(
    allowances: list[Allowance], left: list[Left], refused: Refusal | None, by: int, wait: float, waiting: int
) -> Verdict:
    """`by`: the index of the allowance that refuses."""
    if len(allowances) == 1:
        return Verdict(refused, *left[0], wait, waiting, allowances[0].limits)
    requests = by if refused == "requests" else _least(allowances, left, "requests")
    tokens = by if refused in {"tokens", "size"} else _least(allowances, left, "tokens")
    limits = Limits(
        requests_per_minute=allowances[requests].limits.requests_per_minute,
        tokens_per_minute=allowances[tokens].limits.tokens_per_minute,
        concurrent_requests=allowances[by].limits.concurrent_requests,
        queued_tokens=allowances[0].limits.queued,
    )
    counts = left[requests].requests, left[tokens].tokens, left[by].running
    return Verdict(refused, *counts, wait, waiting, limits, allowances[by].whose if refused else "")


def _least(allowances: list[Allowance], left: list[Left], what: Literal["requests", "tokens"]) -> int:
    limited = [
        i
        for i, allowance in enumerate(allowances)
        if getattr(allowance.limits, f"{what}_per_minute") is not None
    ]
    return min(limited, key=lambda i: getattr(left[i], what), default=0)
