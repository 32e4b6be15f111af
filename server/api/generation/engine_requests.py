"""Maps the body of a generation request to engine requests, one Generate message for each row.

A sampling parameter's way: a field of SamplingBody (bodies.py) -> `_sampling` here -> Sampling
(server/messages.py) -> server/engine/sampler.py. Ranges that depend on the base's vocabulary or context are
checked here; all others by the bodies.
"""

import secrets
import time
from dataclasses import dataclass

from starlette.requests import Request

from server.api.generation.bodies import INT64, SamplingBody
from server.api.generation.choice import Choice
from server.api.generation.generation import Generation
from server.api.generation.model_selection import Target
from server.api.generation.prompts import fit_max_tokens
from server.api.http.body_model import at_most
from server.api.services import Services
from server.errors import InvalidField, shown
from server.messages import Generate, Sampling
from server.tenancy.limits import Limits
from server.tenancy.tenants import Tenant


@dataclass(frozen=True)
class RouteOptions:
    """The parameters that the two routes derive from their bodies in different ways."""

    prefix: str  # of the response's id
    prompts: list[list[int]]  # token ids of each prompt
    max_tokens: int | None  # as requested
    default_max_tokens: int | None  # if none is requested; None: all that fits the context
    logprobs: int | None  # as in Sampling
    grammar: str | None = None  # as in Sampling
    with_calls: bool = False  # the answer may have calls of functions


def build_generation(
    deps: Services,
    tenant: Tenant,
    request: Request,
    target: Target,
    body: SamplingBody,
    options: RouteOptions,
) -> Generation:
    """A row for each prompt and each of n, prompt by prompt. Raises InvalidField, ContextTooLong.

    The rows of a prompt after its first wait for the first, whose KV blocks they share.
    """
    limits: Limits = request.state.limits
    context, vocabulary = max_context(deps, limits), deps.base.vocab_size
    whose = "The model's context" if context == deps.max_context else "max_context, your limit,"
    default_max_tokens = _affordable(limits, options, body.n)
    deadline = time.time() + _timeout(request, deps.settings.request_seconds)
    request_id = f"{options.prefix}-{secrets.token_hex(16)}"
    seed = secrets.randbits(63) if body.seed is None else body.seed
    at_most("min_tokens", body.min_tokens, context)
    if limits.max_n is not None:
        at_most("n", body.n, limits.max_n)
    rows = []
    for number, prompt in enumerate(options.prompts):
        max_tokens = fit_max_tokens(prompt, options.max_tokens, default_max_tokens, context, whose)
        if body.min_tokens > max_tokens:
            raise InvalidField(
                f"min_tokens must be at most max_tokens, which is {max_tokens}, not {body.min_tokens}.",
                param="min_tokens",
            )
        first = number * body.n
        rows += [
            Generate(
                id=f"{request_id}-{first + i}",
                tenant=tenant.id,
                prompt=prompt,
                sampling=_sampling(body, options, max_tokens, _wrap_int64(seed + i), vocabulary),
                adapter=target.adapter,
                adapters=target.adapters,
                deadline=deadline,
                weight=tenant.weight,
                after=f"{request_id}-{first}" if i else None,
            )
            for i in range(body.n)
        ]
    choices = [
        Choice(i, deps.tokenizer, body.stop, body.min_tokens, options.with_calls) for i in range(len(rows))
    ]
    return Generation(deps, request_id, target, options.prompts, rows, choices, request.state.rates)


def max_context(deps: Services, limits: Limits) -> int:
    """Most tokens of prompt and answer together: the model's, or fewer by the tenant's limit."""
    return deps.max_context if limits.max_context is None else min(deps.max_context, limits.max_context)


def _affordable(limits: Limits, options: RouteOptions, n: int) -> int | None:
    """`default_max_tokens`, and no more than fills a whole bucket of the tenant's tokens a minute: a request
    that names no max_tokens is not too large because the context is.
    """
    if limits.tokens_per_minute is None:
        return options.default_max_tokens
    left = limits.tokens_per_minute - sum(map(len, options.prompts))
    share = max(1, left // (n * len(options.prompts)))
    return min(share, options.default_max_tokens or share)


def _sampling(
    body: SamplingBody, options: RouteOptions, max_tokens: int, seed: int, vocabulary: int
) -> Sampling:
    """The sampling parameters as the engine takes them. Raises InvalidField for an unknown token id."""
    for token in body.stop_token_ids:
        _check_token("stop_token_ids", token, vocabulary)
    return Sampling(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=max(body.top_k, 0),
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_logit_bias(body.logit_bias, vocabulary),
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids),
        ignore_eos=body.ignore_eos,
        min_tokens=body.min_tokens,
        logprobs=options.logprobs,
        grammar=options.grammar,
    )


def _logit_bias(bias: dict[str, float], vocabulary: int) -> dict[int, float]:
    by_token = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise InvalidField(f"logit_bias keys are token ids, not {shown(key)}.", param="logit_bias")
        _check_token("logit_bias", int(key), vocabulary)
        by_token[int(key)] = value
    return by_token


def _check_token(field_name: str, token: int, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        raise InvalidField(
            f"{field_name} has the token id {shown(token)}; they run from 0 to {vocabulary - 1}.",
            param=field_name,
        )


def _wrap_int64(seed: int) -> int:
    """`seed` as a signed 64-bit integer."""
    return (seed + INT64 + 1) % (2 * INT64 + 2) - INT64 - 1


def _timeout(request: Request, max_seconds: float) -> float:
    """Seconds of X-Request-Timeout, at most `max_seconds`; without the header `max_seconds`."""
    header = request.headers.get("x-request-timeout")
    if header is None:
        return max_seconds
    try:
        seconds = float(header)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise InvalidField(f"X-Request-Timeout must be a number of seconds above 0, not {shown(header)}.")
    return min(seconds, max_seconds)
