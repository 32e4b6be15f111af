"""Admission of requests to the queue: checks limits and deadlines, compiles schemas.

All rows of a request are admitted, or none.
"""

import time
from collections import Counter
from concurrent.futures import Future
from typing import Any

from server.engine.scheduling.capacity import TenantLoad, refusal
from server.engine.scheduling.row import Row
from server.engine.scheduling.scheduler import Scheduler
from server.engine.scheduling.wait_estimate import WaitEstimate
from server.engine.structured_output import Grammars
from server.engine.unexpected_errors import as_polypeft_error
from server.errors import ContextTooLong, InvalidField, PolypeftError
from server.messages import Chunk, Generate


class Admission:
    """Between `Engine.submit` and the queue of the scheduler."""

    def __init__(self, scheduler: Scheduler, grammars: Grammars, max_queue: int) -> None:
        self.scheduler = scheduler
        self.cache = scheduler.cache
        self.grammars = grammars
        self.max_context = scheduler.max_context
        self.capacity = scheduler.max_seqs + max_queue
        self.waits = WaitEstimate()
        self.refused: list[Chunk] = []  # until the engine reports them
        self.compiling: dict[str, tuple[Row, Future[Any]]] = {}  # rows whose schema is being compiled

    def close(self) -> None:
        self.grammars.close()

    def accept(self, rows: tuple[Generate, ...]) -> None:
        """Admit the rows of one request: all of them or none."""
        error = next(filter(None, map(self._error_of, rows)), None) or self._over_limit(rows)
        error = error or self.waits.refusal(rows[0], self.scheduler.queues, time.time())
        if error:
            self.refused += [Chunk.failure(row.id, error) for row in rows]
            return
        for command in rows:
            self._enqueue(command)

    def cancel(self, id_: str) -> None:
        """Drop a row whose schema is being compiled."""
        self.compiling.pop(id_, None)

    def enqueue_compiled(self) -> None:
        """Queue the rows whose schema has been compiled; refuse those whose schema failed."""
        for id_, (row, future) in [*self.compiling.items()]:
            if future.done():
                del self.compiling[id_]
                error = future.exception()
                if error is None:
                    row.grammar = future.result()
                    row.wait("capacity", time.time())
                    self.scheduler.add(row)
                else:
                    self.refused.append(
                        Chunk.failure(id_, as_polypeft_error(error, "the schema of response_format"))
                    )

    def take_refused(self) -> list[Chunk]:
        """Chunks of the rows refused since the last call."""
        refused, self.refused = self.refused, []
        return refused

    def _error_of(self, command: Generate) -> PolypeftError | None:
        """The error of a row that can never run here."""
        length = len(command.prompt)
        if not 0 < length <= self.max_context - min(command.sampling.max_tokens, 1):
            return ContextTooLong(
                f"The prompt has {length} tokens; the context of {self.max_context} must hold one more."
            )
        if len(command.adapters) > self.cache.slots:
            return InvalidField(
                f"adapters has {len(command.adapters)} items; the device has {self.cache.slots} slots.",
                param="adapters",
            )
        return None

    def _over_limit(self, rows: tuple[Generate, ...]) -> PolypeftError | None:
        """The error of a request that exceeds the limits of capacity.py."""
        compiling = Counter(row.command.tenant for row, _ in self.compiling.values())
        weights = {row.command.tenant: row.command.weight for row, _ in self.compiling.values()}
        loads = {tenant: TenantLoad(count, weights[tenant]) for tenant, count in compiling.items()}
        for tenant, queue in self.scheduler.queues.tenant_queues():
            before = loads[tenant].rows if tenant in loads else 0
            loads[tenant] = TenantLoad(before + queue.num_rows, queue.weight)
        return refusal(rows[0].tenant, len(rows), rows[0].weight, loads, self.capacity)

    def _enqueue(self, command: Generate) -> None:
        row = Row(
            command,
            command.sampling.seed or 0,
            tokens=list(command.prompt),
            prompt_length=len(command.prompt),
        )
        for use in row.uses:  # they load while the row waits
            row.cold_start |= not self.cache.has(use.adapter)
            self.cache.prefetch(use.adapter)
        row.timing.arrived = row.waits_since = time.time()
        if command.sampling.grammar is None:
            self.scheduler.add(row)
        else:
            row.waits_for = "grammar"
            self.compiling[row.id] = (row, self.grammars.compile(command.sampling.grammar))
