"""Which rows run in the next step, and with how many tokens. No torch, no I/O, no clock of its own.

Order of a step: rows that decode (one token each), then rows still in prefill, then newcomers, until the
token budget is spent. Newcomers come from the tenant that has been served least for its weight (Virtual
Token Counter, arXiv 2401.00588), oldest first. A row whose adapter is on its way is passed by; when KV
blocks run out the row admitted last goes back to its queue.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from server.adapters.cache import AdapterCache
from server.adapters.stack import no_meaning
from server.engine.kv import BLOCK, BlockPool, block_hashes, blocks_for
from server.engine.row import Row
from server.errors import ContextTooLong, DeadlineExceeded, InvalidField, InvalidRequest, PolypeftError

PATIENCE = 32  # steps in which a row may lack memory before later rows stop overtaking it
TRIES = 8  # rows that may lack memory in one step before the others are not even asked


@dataclass
class Queue:
    """One tenant's waiting rows and what it has been served, in tokens over weight."""

    rows: OrderedDict[str, Row] = field(default_factory=OrderedDict)
    served: float = 0.0


class Scheduler:
    def __init__(
        self,
        cache: AdapterCache,
        blocks: BlockPool,
        *,
        max_seqs: int,
        max_batch_tokens: int,
        max_context: int,
    ) -> None:
        self.cache = cache
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max(max_batch_tokens, max_seqs)
        self.max_context = max_context
        self.queues: dict[str, Queue] = {}
        self.running: dict[str, Row] = {}  # in order of admission
        self.ended: list[
            tuple[Row, PolypeftError]
        ] = []  # rows that ended without a step; the loop takes them
        self.preemptions = 0
        self.cold: dict[str, Row] = {}  # rows that wait for an adapter's load

    @property
    def waiting(self) -> int:
        return sum(len(queue.rows) for queue in self.queues.values())

    def add(self, row: Row) -> None:
        queue = self.queues.get(row.command.tenant)
        if queue is None or not queue.rows:
            # A tenant that was idle must not cash in on its absence.
            least = min((q.served for q in self.queues.values() if q.rows), default=0.0)
            queue = self.queues.setdefault(row.command.tenant, Queue())
            queue.served = max(queue.served, least)
        queue.rows[row.id] = row

    def find(self, id_: str) -> Row | None:
        if row := self.running.get(id_):
            return row
        return next((q.rows[id_] for q in self.queues.values() if id_ in q.rows), None)

    def remove(self, row: Row) -> None:
        """Forget a row, wherever it is, and give back all it holds."""
        if self.running.pop(row.id, None) is not None:
            self._release(row)
        elif queue := self.queues.get(row.command.tenant):
            queue.rows.pop(row.id, None)
        self.cold.pop(row.id, None)
        self._drop_idle_queues()

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step, each with `scheduled` set; `now` is time.time()."""
        self._expire(now)
        budget = self.max_batch_tokens
        batch: list[Row] = []
        current = list(self.running.values())
        for row in [r for r in current if r.remaining == 1] + [r for r in current if r.remaining > 1]:
            if budget and row.id in self.running and self._continue(row, min(row.remaining, budget), now):
                batch.append(row)
                budget -= row.scheduled
        # A preempted row may already stand in the batch.
        batch = [row for row in batch if row.id in self.running]
        self._note_loaded(now)
        self._admit(batch, budget, now)
        return batch

    def commit(self, row: Row, token: int | None) -> None:
        """Record a row's step: its tokens are computed, and `token`, if any, is its next."""
        row.computed += row.scheduled
        if token is not None:
            row.sampled = True
            row.tokens.append(token)
            self.queues[row.command.tenant].served += 1 / row.command.weight
        row.scheduled = 0
        if row.sampled and self.blocks.share_prefixes:
            names = block_hashes(row.salt, row.tokens, row.hashes)
            for i in range(row.computed // BLOCK - 1, -1, -1):
                if row.blocks[i] in self.blocks.names:
                    break
                self.blocks.name(row.blocks[i], names[i])

    def _continue(self, row: Row, count: int, now: float) -> bool:
        """Room for `count` more tokens of a running row, if need be at the expense of later rows."""
        need = blocks_for(row.computed + count) - len(row.blocks)
        while need > 0:
            if fresh := self.blocks.allocate(need):
                row.blocks += fresh
                break
            victim = next(reversed(self.running.values()))
            if victim is row and len(self.running) == 1:
                self.remove(row)
                error = InvalidRequest(
                    "The request needs more KV memory than this server has.", param="max_tokens"
                )
                self.ended.append((row, error))
                return False
            self._preempt(victim, now)
            if victim is row:
                return False
        row.scheduled = count
        return True

    def _preempt(self, row: Row, now: float) -> None:
        del self.running[row.id]
        self._release(row)
        row.scheduled = 0
        row.waits_for, row.since = "capacity", now
        self.preemptions += 1
        queue = self.queues.setdefault(row.command.tenant, Queue())
        queue.rows[row.id] = row
        queue.rows.move_to_end(row.id, last=False)

    def _release(self, row: Row) -> None:
        self.blocks.release(row.blocks)
        row.blocks = []
        row.computed = 0
        row.fill = None
        self._let_go(row.slots)
        row.slots = ()

    def _admit(self, batch: list[Row], budget: int, now: float) -> None:
        lacking = 0
        for row in self._candidates():
            if budget <= 0 or len(self.running) >= self.max_seqs or lacking >= TRIES:
                return
            if self._waits_for_sibling(row):
                row.wait("sibling", now)
                continue
            try:
                slots = self._acquire(row)
            except PolypeftError as error:
                self.remove(row)
                self.ended.append((row, error))
                continue
            if slots is None and self._loading(row):
                row.wait("adapter", now)
                self.cold[row.id] = row
                continue
            row.wait("capacity", now)
            if slots and not self._lead(row, slots):
                continue
            if slots is None or not self._take_blocks(row, slots):
                self._let_go(slots or ())
                lacking += 1
                row.passed_over += 1
                if row.passed_over > PATIENCE:
                    return  # the memory that comes free next is this row's
                continue
            self._start(row, slots, min(row.remaining, budget), now)
            batch.append(row)
            budget -= row.scheduled

    def _start(self, row: Row, slots: tuple[int, ...], count: int, now: float) -> None:
        queue = self.queues[row.command.tenant]
        del queue.rows[row.id]
        queue.served += row.remaining / row.command.weight
        self.running[row.id] = row
        row.slots = slots
        row.scheduled = count
        row.start(now)
        if not row.admitted:
            row.admitted = True
            row.cached = row.computed

    def _acquire(self, row: Row) -> tuple[int, ...] | None:
        """A pinned slot for each adapter of a row; all or none. Starts what loads are needed."""
        slots: list[int] = []
        missing = False
        try:
            for use in row.uses:
                slot = self.cache.acquire(use.adapter)
                missing |= slot is None
                slots += [] if slot is None else [slot]
        except PolypeftError:
            self._let_go(slots)
            raise
        if missing:
            self._let_go(slots)
            return None
        return tuple(slots)

    def _let_go(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.cache.release(slot)

    def _lead(self, row: Row, slots: tuple[int, ...]) -> bool:
        """Put the adapter's virtual tokens before the text; False if the row cannot run, and has ended."""
        used = [self.cache.by_slot[slot] for slot in slots]
        row.lead_with(sum(resident.virtual for resident in used))
        text, virtual = row.prompt_length - row.virtual, row.virtual
        error: PolypeftError | None = None
        if row.prompt_length >= self.max_context:
            error = ContextTooLong(
                f"The prompt has {text} tokens and the adapter puts {virtual} before them; "
                f"the context of {self.max_context} must hold one more.",
                param="prompt",
            )
        elif row.command.adapters and (sentence := no_meaning(row.command.adapters, used)):
            error = InvalidField(sentence, param="adapters")
        if error:
            self._let_go(slots)
            self.remove(row)
            self.ended.append((row, error))
        return error is None

    def _take_blocks(self, row: Row, slots: tuple[int, ...]) -> bool:
        """Blocks for all of a row's tokens, cached ones first; all or none."""
        names: list[bytes] = []
        if self.blocks.share_prefixes:
            # At least one token is computed, so that there are logits to sample from.
            names = block_hashes(row.salt, row.tokens, row.hashes)[: (len(row.tokens) - 1) // BLOCK]
        shared = self.blocks.match(names)
        fresh = self.blocks.allocate(blocks_for(len(row.tokens)) - len(shared))
        if fresh is None:
            self.blocks.release(shared)
            return False
        if not row.admitted:
            self.blocks.queries += len(row.tokens)
            self.blocks.hits += len(shared) * BLOCK
        row.blocks = shared + fresh
        row.computed = len(shared) * BLOCK
        if any(self.cache.by_slot[slot].given for slot in slots) and row.computed < row.virtual:
            row.fill = row.computed
            row.computed = row.virtual
        return True

    def _loading(self, row: Row) -> bool:
        return any(self.cache.loading(use.adapter) for use in row.uses)

    def _note_loaded(self, now: float) -> None:
        """Rows whose adapter has come wait for room, also while nobody looks at them."""
        for row in [row for row in self.cold.values() if not self._loading(row)]:
            row.wait("capacity", now)
            del self.cold[row.id]

    def _waits_for_sibling(self, row: Row) -> bool:
        """Choices of one prompt wait for the first one's prefill, then share its blocks."""
        leader = self.find(row.command.after) if row.command.after else None
        return leader is not None and not leader.sampled

    def _candidates(self) -> Iterator[Row]:
        """Waiting rows, the least-served tenant's oldest first; who starts is charged at once."""
        left = [(queue, iter(list(queue.rows.values()))) for queue in self.queues.values() if queue.rows]
        while left:
            chosen = min(left, key=lambda pair: pair[0].served)
            row = next(chosen[1], None)
            if row is None:
                left.remove(chosen)
            else:
                yield row

    def _expire(self, now: float) -> None:
        for row in [*self.running.values(), *(r for q in self.queues.values() for r in q.rows.values())]:
            if row.command.deadline is not None and row.command.deadline < now:
                self.remove(row)
                self.ended.append(
                    (row, DeadlineExceeded("The request's deadline passed before it was done."))
                )

    def _drop_idle_queues(self) -> None:
        """A tenant with nothing waiting or running leaves no trace: memory stays bounded."""
        busy = {row.command.tenant for row in self.running.values()}
        for tenant in [t for t, q in self.queues.items() if not q.rows and t not in busy]:
            del self.queues[tenant]
