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
from server.api.generation.priority import priority_of
from server.api.generation.prompts import fit_max_tokens
from server.api.http.body_model import at_most
from server.api.http.rate_limits import RateLimitedRequest
from server.api.services import Services
from server.base_model.tokenizer import Tokenizer
from server.errors import InvalidField, shown
from server.messages import Generate, Sampling
from server.tenancy.limits import Allowance, tightest
from server.tenancy.tenants import Caller, Tenant

# The most prompt logprobs of an answer: 20 for each of 100,000 tokens, and the tokens' own
MAX_PROMPT_LOGPROBS = 2_100_000
BadWords = tuple[tuple[int, ...], ...]  # token ids


@dataclass(frozen=True)
class RouteOptions:
    """The parameters that the two routes derive from their bodies in different ways."""

    prefix: str  # of the response's id
    prompts: list[list[int]]  # token ids of each prompt
    max_tokens: int | None  # as requested
    default_max_tokens: int | None  # if none is requested; None: all that fits the context
    logprobs: int | None  # as in Sampling
    prompt_logprobs: int | None = None  # as in Sampling
    shows_end: bool = False  # as in Choice
    grammar: str | None = None  # as in Sampling
    best_of: int | None = None  # rows of each prompt, if more than n
    with_calls: bool = False  # the answer may have calls of functions


async def build_generation(
    deps: Services,
    tenant: Tenant,
    request: Request,
    target: Target,
    body: SamplingBody,
    options: RouteOptions,
) -> Generation:
    """A row for each prompt and each of n or best_of, prompt by prompt. Raises InvalidField, ContextTooLong.

    The rows of a prompt after its first wait for the first, whose KV blocks they share.
    """
    caller: Caller = request.state.caller
    allowances = await _allowances(caller, request.state.rates, target)
    context, vocabulary = max_context(deps, allowances), deps.base.vocab_size
    whose = "The model's context" if context == deps.max_context else "max_context, your limit,"
    n = options.best_of or body.n
    default_max_tokens = _affordable(tightest(allowances, "tokens_per_minute"), options, n)
    priority = priority_of(body, caller.limits.priority)
    deadline = time.time() + _timeout(request, deps.settings.request_seconds)
    request_id = f"{options.prefix}-{secrets.token_hex(16)}"
    seed = secrets.randbits(63) if body.seed is None else body.seed
    at_most("min_tokens", body.min_tokens, context)
    if (max_n := tightest(allowances, "max_n")) is not None:
        at_most("n" if n == body.n else "best_of", n, max_n)
    bad_words = _bad_words(deps.tokenizer, body.bad_words)
    _check_prompt_logprobs(options, body.n)
    rows = []
    for number, prompt in enumerate(options.prompts):
        max_tokens = fit_max_tokens(prompt, options.max_tokens, default_max_tokens, context, whose)
        if body.min_tokens > max_tokens:
            raise InvalidField(
                f"min_tokens must be at most max_tokens, which is {max_tokens}, not {body.min_tokens}.",
                param="min_tokens",
            )
        first = number * n
        rows += [
            Generate(
                id=f"{request_id}-{first + i}",
                tenant=tenant.id,
                prompt=prompt,
                sampling=_sampling(
                    body, options, max_tokens, _wrap_int64(seed + i), vocabulary, bad_words, first=not i
                ),
                adapter=target.adapter,
                adapters=target.adapters,
                deadline=deadline,
                weight=tenant.weight,
                priority=priority,
                after=f"{request_id}-{first}" if i else None,
            )
            for i in range(n)
        ]
    choices = [_choice(deps.tokenizer, body, options, i) for i in range(len(rows))]
    key: str = request.state.caller.key.id
    return Generation(deps, request_id, target, options.prompts, rows, choices, key, request.state.rates)


def _choice(tokenizer: Tokenizer, body: SamplingBody, options: RouteOptions, index: int) -> Choice:
    return Choice(
        index,
        tokenizer,
        body.stop,
        body.min_tokens,
        options.shows_end,
        keep_stop=body.include_stop_str_in_output,
        show_special=not body.skip_special_tokens,
        show_markers=options.with_calls,
    )


async def _allowances(caller: Caller, rates: RateLimitedRequest | None, target: Target) -> list[Allowance]:
    """Whose limits hold: the tenant's, the key's, the adapters'."""
    if rates is None:
        return caller.allowances
    if caller.adapters_limited:
        await rates.for_adapters(target.names)
    return rates.allowances


def max_context(deps: Services, allowances: list[Allowance]) -> int:
    """Most tokens of prompt and answer together: the model's, or fewer by a limit."""
    limit = tightest(allowances, "max_context")
    return deps.max_context if limit is None else min(deps.max_context, limit)


def _affordable(tokens_per_minute: int | None, options: RouteOptions, n: int) -> int | None:
    """`default_max_tokens`, and no more than fills a whole bucket of tokens a minute: a request that names no
    max_tokens is not too large because the context is.
    """
    if tokens_per_minute is None:
        return options.default_max_tokens
    left = tokens_per_minute - sum(map(len, options.prompts))
    share = max(1, left // (n * len(options.prompts)))
    return min(share, options.default_max_tokens or share)


def _check_prompt_logprobs(options: RouteOptions, n: int) -> None:
    """Raise InvalidField if the answer would hold more of them than MAX_PROMPT_LOGPROBS."""
    if options.prompt_logprobs is not None:
        total = sum(map(len, options.prompts)) * (1 + options.prompt_logprobs) * n
        at_most("the number of prompt logprobs in the answer", total, MAX_PROMPT_LOGPROBS, "prompt")


def _sampling(
    body: SamplingBody,
    options: RouteOptions,
    max_tokens: int,
    seed: int,
    vocabulary: int,
    bad_words: BadWords,
    *,
    first: bool,
) -> Sampling:
    """The sampling parameters as the engine takes them. Raises InvalidField for an unknown token id.

    `first`: of a prompt's n rows, the one that computes its logprobs.
    """
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
        prompt_logprobs=options.prompt_logprobs if first else None,
        grammar=options.grammar,
        bad_words=bad_words,
    )


def _bad_words(tokenizer: Tokenizer, words: list[str]) -> BadWords:
    """The tokens of each word, at the beginning of a text and behind a space, as vLLM reads them."""
    texts = (text for word in words for text in (word.lstrip(), f" {word.lstrip()}") if text.strip())
    sequences = (tuple(tokenizer.encode(text, special=False)) for text in texts)
    return tuple(dict.fromkeys(sequence for sequence in sequences if sequence))


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
