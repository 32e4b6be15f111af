"""Logits to tokens, for a whole batch at once.

Knows nothing of models or text. A row's token depends on its own logits, its own knobs, its seed
and how many tokens it has: never on the other rows, on a global generator, or on how often it was preempted.

The order is vLLM's: logprobs are read off the raw logits (its "raw_logprobs"); then logit_bias, banned
tokens, repetition, presence and frequency penalties change them; then temperature, min_p, top_k, top_p.
A row of -inf with some finite logits is a mask the caller put there, not an accident.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from server.engine.scheduling.row import Row
from server.kernels.transfers import Download, send, upload
from server.messages import Sampling, TokenLogprobs

GREEDY_BELOW = 1e-5  # dividing by less overflows float32
SMALL_K = 256  # up to here one partial sort of all rows beats selecting row by row
STRETCH_COLUMNS = 256  # of a row of logits, whose maximum is found first
MASK64 = (1 << 64) - 1


@dataclass
class SampleRow:
    """One row's knobs and history. `banned`: ids that may not come now (ends, before min_tokens)."""

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    output: Sequence[int]
    banned: Sequence[int] = ()

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        s = self.sampling
        return s.repetition_penalty != 1.0 or s.presence_penalty != 0.0 or s.frequency_penalty != 0.0

    @property
    def edited(self) -> bool:
        """The logits change before the token is chosen."""
        return bool(self.banned) or bool(self.sampling.logit_bias) or self.penalised


def sample_row(row: Row, guessed: int, ends: Iterable[int]) -> SampleRow:
    """The row as it is once so many of its guesses have come true; `ends`: the base's end-of-text ids."""
    s = row.command.sampling
    barred = row.output_length + guessed < s.min_tokens
    return SampleRow(
        sampling=s,
        seed=row.seed,
        prompt=row.tokens[row.num_virtual_tokens : row.prompt_length],
        output=row.tokens[row.prompt_length :] + row.draft[:guessed],
        banned=[*ends, *s.stop_token_ids] if barred else (),
    )


@dataclass(frozen=True)
class Sampled:
    """`finite` is False when the logits held NaN or +Inf, or nothing but -Inf: token means nothing then."""

    token: int
    logprobs: TokenLogprobs | None
    finite: bool


class PendingTokens:
    """A token for each row, int64 [R] on the device, and on its way to the host, which may go on meanwhile.

    Nothing of the logits is needed any more.
    """

    def __init__(
        self, tokens: Tensor, finite: Tensor, asked: Sequence[tuple[int, int]], raw: Tensor | None
    ) -> None:
        """`asked`: rows that want logprobs, and of how many tokens; `raw`: all of theirs."""
        self.tokens = tokens
        self._logprob_rows = asked
        parts = [torch.stack([tokens, finite.to(tokens.dtype)])]
        if raw is not None:
            chosen = tokens[_on_device([i for i, _ in asked], tokens)].unsqueeze(-1)
            best = raw.topk(min(max(most for _, most in asked), raw.shape[-1]))
            parts += [raw.gather(-1, chosen).squeeze(-1), best.indices, best.values]
        self._download = Download(parts)

    def read(self) -> list[Sampled]:
        """Waits for them."""
        both, *of_asked = (part.tolist() for part in self._download.wait())
        logprobs: dict[int, TokenLogprobs] = {}
        for (i, most), chosen, ids, values in zip(self._logprob_rows, *of_asked, strict=True):
            # masked tokens are no news
            best = [pair for pair in zip(ids, values, strict=True) if pair[1] > -torch.inf]
            logprobs[i] = TokenLogprobs(chosen, best[:most])
        return [
            Sampled(token, logprobs.get(i) if ok else None, bool(ok))
            for i, (token, ok) in enumerate(zip(*both, strict=True))
        ]


def draw(logits: Tensor, rows: Sequence[SampleRow]) -> PendingTokens:
    """One token for each row of logits [R, V] float32, which are scratch: they may be changed in place."""
    best, tokens = _highest(logits)  # NaN and +Inf win, so `best` also tells whether the row is finite
    finite = best.isfinite()
    asked = [(i, n) for i, row in enumerate(rows) if (n := row.sampling.logprobs) is not None]
    raw = None  # a copy, before the edits
    if asked:
        raw = logits[_on_device([i for i, _ in asked], tokens)].log_softmax(dim=-1)

    edited = _indices(rows, lambda row: row.edited)
    if edited:
        _edit(logits, [(i, rows[i]) for i in edited])
        at = _on_device(edited, tokens)
        tokens[at] = logits[at].argmax(dim=-1)
    random = _indices(rows, lambda row: not row.greedy)
    if random and len(random) == len(rows):
        tokens = _draw(logits, list(rows))
    elif random:
        at = _on_device(random, tokens)
        tokens[at] = _draw(logits[at], [rows[i] for i in random])
    return PendingTokens(tokens, finite, asked, raw)


def uniform(seed: int, step: int, attempt: int = 0) -> float:
    """The number in [0, 1) that draws a row's token `step`: 24 bits, so that float32 holds it exactly."""
    bits = _splitmix64(_splitmix64(_splitmix64(seed & MASK64) ^ step) ^ attempt)
    return (bits >> 40) / (1 << 24)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def _on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """On the device and of the dtype of `like`; the copy is not waited for."""
    return send(values, like.device, like.dtype)


def _indices(rows: Sequence[SampleRow], test: Callable[[SampleRow], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if test(row)]


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's highest value, and the first place of it: what `max` over all columns finds, in a quarter of
    the time on a CPU, where only maxima without places are computed by whole vectors.
    """
    whole = logits.shape[-1] // STRETCH_COLUMNS * STRETCH_COLUMNS
    if logits.is_cuda or not whole:
        found = logits.max(dim=-1)
        return found.values, found.indices
    stretches = logits[:, :whole].reshape(len(logits), whole // STRETCH_COLUMNS, STRETCH_COLUMNS)
    best, at = stretches.amax(dim=-1).max(dim=-1)
    tokens = at * STRETCH_COLUMNS + stretches[torch.arange(len(at)), at].argmax(dim=-1)
    if whole == logits.shape[-1]:
        return best, tokens
    rest, places = logits[:, whole:].max(dim=-1)
    return best.maximum(rest), torch.where(best >= rest, tokens, whole + places)


def _edit(logits: Tensor, rows: list[tuple[int, SampleRow]]) -> None:
    """Bias, bans and penalties, in place. A token named twice gets the same value written twice."""
    bias = [(i, t, value) for i, row in rows for t, value in row.sampling.logit_bias.items()]
    if bias:
        i, t, values = zip(*bias, strict=True)
        logits[tuple(upload([i, t], logits.device))] += _on_device(values, logits)
    bans = [(i, t) for i, row in rows for t in row.banned]
    if bans:
        logits[tuple(upload([*zip(*bans, strict=True)], logits.device))] = -torch.inf
    penalised = [(i, row) for i, row in rows if row.penalised]
    if penalised:
        _penalise(logits, penalised)


def _penalise(logits: Tensor, rows: list[tuple[int, SampleRow]]) -> None:
    """Repetition over prompt and output, presence and frequency over the output."""
    repeated = [(i, row) for i, row in rows if row.sampling.repetition_penalty != 1.0]
    if repeated:
        at = _token_indices(logits, [(i, [*row.prompt, *row.output]) for i, row in repeated])
        lengths = [len(row.prompt) + len(row.output) for _, row in repeated]
        factor = _repeat(logits, [row.sampling.repetition_penalty for _, row in repeated], lengths)
        value = logits[at]
        logits[at] = torch.where(value > 0, value / factor, value * factor)
    at = _token_indices(logits, [(i, row.output) for i, row in rows])
    lengths = [len(row.output) for _, row in rows]
    logits[at] -= _repeat(logits, [row.sampling.presence_penalty for _, row in rows], lengths)
    frequency = _repeat(logits, [row.sampling.frequency_penalty for _, row in rows], lengths)
    logits.index_put_(at, -frequency, accumulate=True)  # once for every time the token came


def _token_indices(logits: Tensor, tokens: list[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """(row, token) indices of all these tokens; out of range raises instead of touching another row."""
    rows = [i for i, ids in tokens for _ in ids]
    at, ids = upload([rows, [*chain.from_iterable(ids for _, ids in tokens)]], logits.device)
    return at, ids


def _repeat(logits: Tensor, values: list[float], lengths: list[int]) -> Tensor:
    return _on_device([v for v, n in zip(values, lengths, strict=True) for _ in range(n)], logits)


def _draw(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """A token for each row of logits [R, V], which are used up."""
    temperature = _on_device([row.sampling.temperature for row in rows], logits)
    probs = logits.div_(temperature.unsqueeze(-1)).softmax(dim=-1)
    limited = _indices(rows, lambda row: row.sampling.top_k > 0 or row.sampling.min_p > 0.0)
    if limited:
        allowed = torch.empty_like(probs)  # comparing into floats spares the conversion
        probs.mul_(torch.ge(probs, _floor(probs, rows, limited), out=allowed))
    return _draw_nucleus(probs, rows)


def _floor(probs: Tensor, rows: list[SampleRow], limited: list[int]) -> Tensor:
    """The least probability that min_p and top_k leave to each row, [R, 1]; as likely as the k-th stays."""
    vocabulary = probs.shape[-1]
    floor = probs.new_zeros(len(rows))
    at = send(limited, probs.device)
    floor[at] = _on_device([rows[i].sampling.min_p for i in limited], probs) * probs[at].amax(dim=-1)
    small = [i for i in limited if 0 < rows[i].sampling.top_k <= min(SMALL_K, vocabulary)]
    if small:
        ks = [rows[i].sampling.top_k for i in small]
        at, last = upload([small, [k - 1 for k in ks]], probs.device)
        kth = probs[at].topk(max(ks)).values.gather(-1, last.unsqueeze(-1)).squeeze(-1)
        floor[at] = floor[at].maximum(kth)
    for i in limited:
        if SMALL_K < rows[i].sampling.top_k < vocabulary:
            kth = probs[i].kthvalue(vocabulary - rows[i].sampling.top_k + 1).values
            floor[i] = floor[i].maximum(kth)
    return floor.unsqueeze(-1)


def _draw_nucleus(weights: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw from weights [R, V] within each row's top_p, by rejection instead of by sorting.

    A drawn token is inside the nucleus when the tokens likelier than it hold less than top_p of the mass.
    If it is not, nothing as unlikely is either: draw again among the likelier ones. That leaves the odds
    within the nucleus as they were; most rows need one pass, hardly any more than three.
    """
    shares = [row.sampling.top_p if row.sampling.top_p < 1.0 else math.inf for row in rows]
    top_p = send(shares, weights.device, torch.float64)
    tokens = torch.empty(len(rows), dtype=torch.long, device=weights.device)
    todo, limit = list(range(len(rows))), top_p
    for attempt in count():
        scratch = weights.cumsum(dim=-1)  # torch sums in float64 and rounds once
        if attempt == 0:
            limit = top_p * scratch[:, -1]
        u = _on_device([uniform(rows[i].seed, len(rows[i].output), attempt) for i in todo], weights)
        drawn = torch.searchsorted(scratch, u.unsqueeze(-1) * scratch[:, -1:], right=True)
        drawn.clamp_(max=weights.shape[-1] - 1)  # a NaN row finds nothing
        tokens[_on_device(todo, tokens)] = drawn.squeeze(-1)
        if min(shares) == math.inf:
            break
        likelier = torch.gt(weights, weights.gather(-1, drawn), out=scratch).mul_(weights)
        above = likelier.sum(dim=-1, dtype=torch.float64)
        outside = (above >= limit) & (above > 0)  # the likeliest token is always inside
        if not outside.any():
            break
        todo = [i for i, again in zip(todo, outside.tolist(), strict=True) if again]
        weights, limit = likelier[outside], limit[outside]
    return tokens
