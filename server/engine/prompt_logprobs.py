"""Logprobs of the tokens of prompts, computed with their prefill.

The logits of a chunk of a prompt never exist together: the output head computes those of as many positions
as fit MAX_LOGIT_BYTES, and of each only the numbers that the row asks for are kept. Rows that ask for none
pay for none.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch

from server.engine.model.forward_context import ForwardContext
from server.engine.model.output_head import OutputHead
from server.engine.scheduling.row import Row
from server.kernels.transfers import Download, upload
from server.messages import PromptLogprobs

MAX_LOGIT_BYTES = 64 << 20  # float32 logits of the positions that are computed at once


@dataclass(frozen=True)
class Scored:
    """The prompt logprobs of one row in one step. They are void unless `finite`: no NaN or +Inf in logits."""

    logprobs: PromptLogprobs
    finite: bool


class Target(NamedTuple):
    """A position with logits: its row, its place in the packed step, and the token that follows it."""

    row: Row
    place: int
    token: int


class PendingScores:
    """What was computed for `targets`, with an asynchronous copy to the host under way."""

    def __init__(self, targets: Sequence[Target], parts: Sequence[torch.Tensor]) -> None:
        """`parts` [len(targets), ...]: logprobs of the tokens, their ranks, best ids, logprobs of these."""
        self._targets = targets
        self._download = Download(parts)

    def read(self) -> dict[str, Scored]:
        """Wait for the copy; the results by row id."""
        parts = self._download.wait()
        found, start = {}, 0
        for row, targets in groupby(self._targets, lambda target: target.row):
            end = start + len(list(targets))
            logprobs, ranks, best, best_logprobs = (part[start:end] for part in parts)
            k = row.command.sampling.prompt_logprobs or 0
            found[row.id] = Scored(
                PromptLogprobs(
                    *map(_as_bytes, (logprobs, ranks.int(), best[:, :k].int(), best_logprobs[:, :k]))
                ),
                finite=not bool(logprobs.isnan().any()),
            )
            start = end
        return found


class PromptScorer:
    """Computes prompt logprobs of a step from the hidden states of its tokens."""

    def __init__(self, model: Any, step: ForwardContext, vocab_size: int) -> None:
        self._head, self._step = OutputHead(model), step
        self._positions = max(1, MAX_LOGIT_BYTES // (4 * vocab_size))  # whose logits are computed at once

    def capture(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Inside, the hidden states [1, T, hidden] of each step are appended to the list."""
        return self._head.capture()

    def begin(self, rows: Sequence[Row], hidden: torch.Tensor) -> PendingScores:
        """Score the prompt tokens of `rows` in the step that has just run; hidden [T, hidden] of its tokens.

        The banks of the output head are set anew: it must have run for the step's own tokens.
        """
        targets = [target for row in rows for target in self._targets(row)]
        count = max(row.command.sampling.prompt_logprobs or 0 for row in rows)
        slices = [
            self._score(targets[i : i + self._positions], hidden, count)
            for i in range(0, len(targets), self._positions)
        ]
        return PendingScores(targets, [torch.cat(parts) for parts in zip(*slices, strict=True)])

    def _targets(self, row: Row) -> Iterator[Target]:
        first = self._step.last_token[row.id] + 1 - row.scheduled - row.computed
        for position in row.to_score():
            yield Target(row, first + position, row.tokens[position + 1])

    def _score(self, targets: Sequence[Target], hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
        """Of each target: its logprob, its rank, and the ids and logprobs of the `count` likeliest tokens."""
        self._step.select_head_tokens(
            (row, len(list(group))) for row, group in groupby(targets, lambda target: target.row)
        )
        places, tokens = upload([[t.place for t in targets], [t.token for t in targets]], hidden.device)
        # as the sampler and transformers compute them: another formula differs in the fifth digit
        logprobs = self._head.logits(hidden[places]).float().log_softmax(dim=-1)
        own = logprobs.gather(-1, tokens[:, None])
        best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
        return own[:, 0], (logprobs > own).sum(dim=-1) + 1, best.indices, best.values


def _as_bytes(part: torch.Tensor) -> bytes:
    return part.contiguous().numpy().tobytes()
