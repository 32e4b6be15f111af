"""Samples one token from the logits of each row, for a whole batch at once.

Knows nothing of models or text. The token of a row depends on its own logits, sampling parameters, seed and
number of tokens: not on other rows, not on a global random generator, and not on how often the row was
preempted.

The order is vLLM's: logprobs are taken from the raw logits (its "raw_logprobs"); then logit_bias, banned
tokens, repetition, presence and frequency penalties change the logits; then temperature, min_p, top_k, top_p.
A row of -inf with some finite logits is a mask that the caller put there, not an error.
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

GREEDY_BELOW = 1e-5  # temperature; dividing by less overflows float32
MAX_BATCHED_TOP_K = 256  # up to this k one partial sort of all rows is faster than selecting row by row
STRIP_COLUMNS = 256  # of logits, whose maxima are found first
MASK64 = (1 << 64) - 1


@dataclass
class SampleRow:
    """Sampling parameters and history of one row. `banned`: ids excluded now (ends, bad words)."""

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
        """The logits are changed before sampling."""
        return bool(self.banned) or bool(self.sampling.logit_bias) or self.penalised


def sample_row(row: Row, num_draft: int, end_token_ids: Iterable[int]) -> SampleRow:
    """The row as if `num_draft` of its draft tokens were accepted; `end_token_ids` are those of the base."""
    s = row.command.sampling
    too_short = row.output_length + num_draft < s.min_tokens
    output = row.tokens[row.prompt_length :] + row.draft[:num_draft]
    banned = [*end_token_ids, *s.stop_token_ids] if too_short else []
    return SampleRow(
        sampling=s,
        seed=row.seed,
        prompt=row.tokens[row.num_virtual_tokens : row.prompt_length],
        output=output,
        banned=banned + _last_tokens(s.bad_words, output) if s.bad_words else banned,
    )


def _last_tokens(words: Iterable[Sequence[int]], output: list[int]) -> list[int]:
    """The tokens that would complete one of `words`, which `output` ends with but for the last."""
    return [word[-1] for word in words if output[len(output) - len(word) + 1 :] == list(word[:-1])]


@dataclass(frozen=True)
class Sampled:
    """The result of one row. `token` is void unless `finite`: no NaN or +Inf, and not only -Inf."""

    token: int
    logprobs: TokenLogprobs | None
    finite: bool


class PendingTokens:
    """Sampled tokens, int64 [R] on the device, with an asynchronous copy to the host under way.

    The logits may be overwritten.
    """

    def __init__(
        self, tokens: Tensor, finite: Tensor, logprob_rows: Sequence[tuple[int, int]], raw: Tensor | None
    ) -> None:
        """`logprob_rows`: (row, k) for rows with k logprobs; `raw`: their logprobs [len(logprob_rows), V]."""
        self.tokens = tokens
        self._logprob_rows = logprob_rows
        parts = [torch.stack([tokens, finite.to(tokens.dtype)])]
        if raw is not None:
            chosen = tokens[_on_device([i for i, _ in logprob_rows], tokens)].unsqueeze(-1)
            best = raw.topk(min(max(k for _, k in logprob_rows), raw.shape[-1]))
            parts += [raw.gather(-1, chosen).squeeze(-1), best.indices, best.values]
        self._download = Download(parts)

    def read(self) -> list[Sampled]:
        """Wait for the copy; the results in the order of the rows."""
        token_and_finite, *logprob_parts = (part.tolist() for part in self._download.wait())
        logprobs: dict[int, TokenLogprobs] = {}
        for (i, k), chosen, ids, values in zip(self._logprob_rows, *logprob_parts, strict=True):
            # masked tokens are left out
            best = [pair for pair in zip(ids, values, strict=True) if pair[1] > -torch.inf]
            logprobs[i] = TokenLogprobs(chosen, best[:k])
        return [
            Sampled(token, logprobs.get(i) if ok else None, bool(ok))
            for i, (token, ok) in enumerate(zip(*token_and_finite, strict=True))
        ]


def draw(logits: Tensor, rows: Sequence[SampleRow]) -> PendingTokens:
    """Sample a token for each row of logits [R, V] float32, which may be changed in place."""
    best, tokens = _highest(logits)  # NaN and +Inf win, so `best` also tells whether the row is finite
    finite = best.isfinite()
    logprob_rows = [(i, k) for i, row in enumerate(rows) if (k := row.sampling.logprobs) is not None]
    raw = None  # a copy, before the edits
    if logprob_rows:
        raw = logits[_on_device([i for i, _ in logprob_rows], tokens)].log_softmax(dim=-1)

    edited = _indices(rows, lambda row: row.edited)
    if edited:
        _edit(logits, [(i, rows[i]) for i in edited])
        indices = _on_device(edited, tokens)
        tokens[indices] = logits[indices].argmax(dim=-1)
    random = _indices(rows, lambda row: not row.greedy)
    if random and len(random) == len(rows):
        tokens = _draw(logits, list(rows))
    elif random:
        indices = _on_device(random, tokens)
        tokens[indices] = _draw(logits[indices], [rows[i] for i in random])
    return PendingTokens(tokens, finite, logprob_rows, raw)


def uniform(seed: int, step: int, attempt: int = 0) -> float:
    """The random number in [0, 1) for token `step` of a row: 24 bits, which float32 represents exactly."""
    bits = _splitmix64(_splitmix64(_splitmix64(seed & MASK64) ^ step) ^ attempt)
    return (bits >> 40) / (1 << 24)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def _on_device(values: Sequence[float], like: Tensor) -> Tensor:
    """`values` as a tensor of the device and dtype of `like`; does not wait for the copy."""
    return send(values, like.device, like.dtype)


def _indices(rows: Sequence[SampleRow], test: Callable[[SampleRow], bool]) -> list[int]:
    return [i for i, row in enumerate(rows) if test(row)]


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest value of each row of logits [R, V], and its first column: [R] each.

    The same as `max` over all columns, in a quarter of the time on a CPU, where only a maximum without its
    index is vectorised: so the strip with the maximum is found first, then the column within it.
    """
    covered = logits.shape[-1] // STRIP_COLUMNS * STRIP_COLUMNS  # columns in full strips
    if logits.is_cuda or not covered:
        highest = logits.max(dim=-1)
        return highest.values, highest.indices
    strips = logits[:, :covered].reshape(len(logits), covered // STRIP_COLUMNS, STRIP_COLUMNS)
    best, strip = strips.amax(dim=-1).max(dim=-1)
    tokens = strip * STRIP_COLUMNS + strips[torch.arange(len(strip)), strip].argmax(dim=-1)
    if covered == logits.shape[-1]:
        return best, tokens
    rest, columns = logits[:, covered:].max(dim=-1)
    return best.maximum(rest), torch.where(best >= rest, tokens, covered + columns)


def _edit(logits: Tensor, rows: list[tuple[int, SampleRow]]) -> None:
    """Apply logit_bias, banned tokens and penalties to logits [R, V] in place.

    A token that is listed twice gets the same value written twice.
    """
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
    """Apply repetition penalties of prompt and output, presence and frequency penalties of the output."""
    repeated = [(i, row) for i, row in rows if row.sampling.repetition_penalty != 1.0]
    if repeated:
        indices = _token_indices(logits, [(i, [*row.prompt, *row.output]) for i, row in repeated])
        lengths = [len(row.prompt) + len(row.output) for _, row in repeated]
        factor = _repeat(logits, [row.sampling.repetition_penalty for _, row in repeated], lengths)
        value = logits[indices]
        logits[indices] = torch.where(value > 0, value / factor, value * factor)
    indices = _token_indices(logits, [(i, row.output) for i, row in rows])
    lengths = [len(row.output) for _, row in rows]
    logits[indices] -= _repeat(logits, [row.sampling.presence_penalty for _, row in rows], lengths)
    frequency = _repeat(logits, [row.sampling.frequency_penalty for _, row in rows], lengths)
    logits.index_put_(indices, -frequency, accumulate=True)  # once for every occurrence of the token


def _token_indices(logits: Tensor, tokens: list[tuple[int, Sequence[int]]]) -> tuple[Tensor, Tensor]:
    """(row, token) indices of all these tokens; one out of range raises and touches no other row."""
    rows = [i for i, ids in tokens for _ in ids]
    row_indices, ids = upload([rows, [*chain.from_iterable(ids for _, ids in tokens)]], logits.device)
    return row_indices, ids


def _repeat(logits: Tensor, values: list[float], lengths: list[int]) -> Tensor:
    """Each value, repeated as many times as `lengths` says."""
    return _on_device([v for v, n in zip(values, lengths, strict=True) for _ in range(n)], logits)


def _draw(logits: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw a token for each row of logits [R, V], which are overwritten: int64 [R]."""
    temperature = _on_device([row.sampling.temperature for row in rows], logits)
    probs = logits.div_(temperature.unsqueeze(-1)).softmax(dim=-1)
    limited = _indices(rows, lambda row: row.sampling.top_k > 0 or row.sampling.min_p > 0.0)
    if limited:
        allowed = torch.empty_like(probs)  # a float output saves a conversion
        probs.mul_(torch.ge(probs, _floor(probs, rows, limited), out=allowed))
    return _draw_nucleus(probs, rows)


def _floor(probs: Tensor, rows: list[SampleRow], limited: list[int]) -> Tensor:
    """The lowest probability that min_p and top_k allow in each row, [R, 1]; ties with the k-th stay."""
    vocabulary = probs.shape[-1]
    floor = probs.new_zeros(len(rows))
    indices = send(limited, probs.device)
    floor[indices] = _on_device([rows[i].sampling.min_p for i in limited], probs) * probs[indices].amax(
        dim=-1
    )
    small = [i for i in limited if 0 < rows[i].sampling.top_k <= min(MAX_BATCHED_TOP_K, vocabulary)]
    if small:
        ks = [rows[i].sampling.top_k for i in small]
        indices, last = upload([small, [k - 1 for k in ks]], probs.device)
        kth = probs[indices].topk(max(ks)).values.gather(-1, last.unsqueeze(-1)).squeeze(-1)
        floor[indices] = floor[indices].maximum(kth)
    for i in limited:
        if MAX_BATCHED_TOP_K < rows[i].sampling.top_k < vocabulary:
            kth = probs[i].kthvalue(vocabulary - rows[i].sampling.top_k + 1).values
            floor[i] = floor[i].maximum(kth)
    return floor.unsqueeze(-1)


def _draw_nucleus(weights: Tensor, rows: list[SampleRow]) -> Tensor:
    """Draw from weights [R, V] within each row's top_p, by rejection instead of by sorting.

    A drawn token is inside the nucleus if the tokens likelier than it hold less than top_p of the mass. If it
    is not, no token as unlikely is inside either, so the next draw is among the likelier ones. That leaves
    the relative probabilities within the nucleus as they were. Most rows need one pass, hardly any more than
    three.
    """
    shares = [row.sampling.top_p if row.sampling.top_p < 1.0 else math.inf for row in rows]
    top_p = send(shares, weights.device, torch.float64)
    tokens = torch.empty(len(rows), dtype=torch.long, device=weights.device)
    pending, limit = list(range(len(rows))), top_p
    for attempt in count():
        scratch = weights.cumsum(dim=-1)  # torch accumulates in float64 and rounds once
        if attempt == 0:
            limit = top_p * scratch[:, -1]
        u = _on_device([uniform(rows[i].seed, len(rows[i].output), attempt) for i in pending], weights)
        drawn = torch.searchsorted(scratch, u.unsqueeze(-1) * scratch[:, -1:], right=True)
        drawn.clamp_(max=weights.shape[-1] - 1)  # for a row of NaN the index is V
        tokens[_on_device(pending, tokens)] = drawn.squeeze(-1)
        if min(shares) == math.inf:
            break
        likelier = torch.gt(weights, weights.gather(-1, drawn), out=scratch).mul_(weights)
        above = likelier.sum(dim=-1, dtype=torch.float64)
        outside = (above >= limit) & (above > 0)  # the likeliest token is always inside
        if not outside.any():
            break
        pending = [i for i, again in zip(pending, outside.tolist(), strict=True) if again]
        weights, limit = likelier[outside], limit[outside]
    return tokens
