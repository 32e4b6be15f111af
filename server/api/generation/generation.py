"""A running generation request: rows go to the engine, pieces of text come out. Both routes use it."""

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

from server.api.generation.choice import Choice, Piece
from server.api.generation.model_selection import Target
from server.api.http.rate_limits import RateLimitedRequest
from server.api.services import Services
from server.errors import DeadlineUnreachable, EngineLost, PolypeftError, QueueFull, TenantQueueFull
from server.messages import Chunk, Generate, PromptLogprobs
from server.tracing import RowTrace, annotate
from server.usage.ledger import Entry, Tokens
from server.usage.record import CANCELLED, COMPLETED, adapter_version


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass
class Generation:
    """A running request. It has a row and a choice for each prompt and each of n, prompt by prompt."""

    deps: Services
    id: str
    target: Target
    prompts: list[list[int]]
    rows: list[Generate]
    choices: list[Choice]
    key_id: str
    rates: RateLimitedRequest | None = None  # if the tenant's rates are limited
    created: int = field(default_factory=lambda: int(time.time()))
    # of each prompt, as its steps sent them
    prompt_logprobs: dict[int, list[PromptLogprobs]] = field(default_factory=dict)
    _arrived: float = field(default_factory=time.monotonic)
    _begun: bool = False  # the engine has computed something

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Pieces as they arrive, until every choice has finished. Closing it cancels the other rows.

        Raises the error that ended the request early: EngineLost, DeadlineExceeded, NonFinite, ...
        """
        self.deps.admit(len(self.rows))
        choices = {row.id: choice for row, choice in zip(self.rows, self.choices, strict=True)}
        metrics, engine = _RequestMetrics(self, self._arrived), self.deps.engine
        async with (
            self._admitted(),
            self._recorded() as entry,
            metrics,
            aclosing(engine.generate(*self.rows)) as chunks,
        ):
            async for chunk in chunks:
                if not self._begun:
                    self._begun = True
                    if self.rates is not None:
                        self.rates.begin(self.id)
                choice = choices[chunk.id]
                if choice.finished:
                    continue
                if chunk.finish == "cancelled":
                    raise EngineLost("The engine gave this request up; send it again.")
                metrics.record(choice.index, chunk)
                if chunk.prompt_logprobs:
                    self.prompt_logprobs.setdefault(choice.index // self.n, []).append(chunk.prompt_logprobs)
                piece = choice.feed(chunk)
                if piece.finish is not None:
                    metrics.finish(choice, piece.finish)
                    if chunk.finish is None:  # a stop string, of which the engine does not know
                        engine.cancel(chunk.id)
                    if all(choice.finished for choice in self.choices):
                        entry.end(COMPLETED)  # before the client can see it
                if piece.text or piece.tokens or piece.finish:
                    yield piece

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        """Hold what the request takes of its tenant's rates. Raises RateLimited.

        In the end all goes back that it has not used: everything, if the engine never began.
        """
        if self.rates is None or not self.rates.counts:
            yield
            return
        prompts = sum(map(len, self.prompts))
        reserved = prompts + sum(row.sampling.max_tokens for row in self.rows)
        await self.rates.admit(self.id, self.target.model, reserved)
        try:
            yield
        finally:
            used = prompts + self.usage.completion_tokens if self._begun else 0
            await self.rates.settle(self.id, reserved - used)

    @asynccontextmanager
    async def _recorded(self) -> AsyncIterator[Entry]:
        """The request's record in the ledger of usage, which ends here at the latest."""
        uses = [use.adapter for use in self.target.adapters]
        if self.target.adapter is not None:
            uses = [self.target.adapter]
        adapter = "+".join(adapter_version(use.name, use.version) for use in uses)
        tenant = self.rows[0].tenant
        entry = self.deps.ledger.begin(self.id, tenant, self.key_id, adapter, self._tokens)
        try:
            yield entry
        except PolypeftError as error:
            entry.end(error.code)
            raise
        except Exception:
            entry.end(PolypeftError.code)
            raise
        finally:
            entry.end(CANCELLED)

    def _tokens(self) -> Tokens:
        """What is charged for so far: nothing before the engine has answered."""
        usage = self.usage
        prompt = usage.prompt_tokens if self._begun else 0
        return Tokens(prompt, usage.cached_tokens, usage.completion_tokens)

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=sum(map(len, self.prompts)),
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
            cached_tokens=sum(choice.cached_tokens for choice in self.choices[:: self.n]),
        )

    @property
    def deadline(self) -> float | None:
        """The time.time() at which the engine ends the rows."""
        return self.rows[0].deadline

    @property
    def n(self) -> int:
        """Choices for each prompt."""
        return len(self.choices) // len(self.prompts)


class _RequestMetrics:
    """Counts one request's latencies and its end, in the metrics and in its trace."""

    def __init__(self, generation: Generation, arrived: float) -> None:
        self._metrics = generation.deps.metrics
        self._arrived = arrived
        self._unfinished = len(generation.rows)
        self._last_token_at: dict[int, float] = {}  # time.monotonic() by choice
        self._traces = [RowTrace(row, choice) for choice, row in enumerate(generation.rows)]
        annotate({"gen_ai.request.model": generation.target.model})

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Count the choices that have not finished, and why the request ended."""
        if isinstance(error, QueueFull | DeadlineUnreachable):
            self._metrics.count("rejections", "queue_full" if isinstance(error, QueueFull) else "deadline")
            return
        if isinstance(error, TenantQueueFull):  # a 429 is counted by its status
            return
        failed = isinstance(error, PolypeftError)
        if isinstance(error, PolypeftError):
            self._metrics.count("failures", error.code)
        for _ in range(self._unfinished):
            self._metrics.count("finished", "error" if failed else "abort")

    def record(self, index: int, chunk: Chunk) -> None:
        """Observe the time to the first token, or between tokens, of the choice `index`."""
        if chunk.timing is not None:
            self._traces[index].first_token(chunk.timing)
        if not chunk.tokens:
            return
        now = time.monotonic()
        if index in self._last_token_at:
            self._metrics.observe("between_tokens", (now - self._last_token_at[index]) / len(chunk.tokens))
        else:
            self._metrics.observe("first_token", now - self._arrived)
        self._last_token_at[index] = now

    def finish(self, choice: Choice, reason: str) -> None:
        """Count a choice that has finished."""
        self._unfinished -= 1
        self._metrics.observe("end_to_end", time.monotonic() - self._arrived)
        self._metrics.count("finished", reason)
        self._traces[choice.index].finish(choice.completion_tokens)
