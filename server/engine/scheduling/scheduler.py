"""Which rows run in the next step, and with how many tokens. No torch, no I/O, no clock of its own.

Order of a step: decoding rows (one token each and draft tokens), then prompts until the token budget is
spent: by tenant in the order of fair_queue.py, and of each tenant its rows in prefill before its waiting
rows. A row whose adapter is still loading is skipped. When the batch is full or KV blocks run out,
preemption.py chooses the row that goes back to its queue.
"""

from collections import Counter
from collections.abc import Sequence

from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling.fair_queue import FairQueue, PrefillOrder
from server.engine.scheduling.kv_blocks import BLOCK, BlockPool, block_hashes
from server.engine.scheduling.preemption import VictimSelector, victim_for_growth
from server.engine.scheduling.row import Row
from server.engine.scheduling.row_resources import RowResources
from server.engine.scheduling.step_cost import StepCost
from server.errors import DeadlineExceeded, InvalidRequest, PolypeftError

MAX_OVERTAKEN_STEPS = 32  # steps in which a row may lack memory before later rows stop overtaking it
MAX_DRAFT_TOKENS = 48  # in one step, of all rows
MAX_ROWS_WITHOUT_MEMORY = 8  # in one step; after so many no other waiting row is tried


class Scheduler:
    """Queues, running rows and their resources. Not thread-safe."""

    def __init__(
        self,
        cache: AdapterCache,
        blocks: BlockPool,
        *,
        max_seqs: int,
        max_batch_tokens: int,
        max_context: int,
        lookup_tokens: int = 0,
        step_cost: StepCost | None = None,
        rope_switches: Sequence[int] = (),
    ) -> None:
        """`lookup_tokens`: draft tokens of a row in a step. `step_cost` None: drafts save no time here."""
        self.cache = cache
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max(max_batch_tokens, max_seqs)
        self.max_context = max_context
        self.resources = RowResources(cache, blocks, max_context, rope_switches)
        self.reserve_blocks = self.resources.reserve_blocks
        self.max_row_draft = lookup_tokens if step_cost else 0
        self.step_cost = step_cost or StepCost()
        self.queues = FairQueue()
        self.running: dict[str, Row] = {}  # in order of admission
        # rows that the scheduler has ended, until the engine reports them
        self.ended_unscheduled: list[tuple[Row, PolypeftError]] = []
        self.preemptions = 0
        self.waiting_for_adapter: dict[str, Row] = {}  # rows whose adapter is loading

    @property
    def waiting(self) -> int:
        return len(self.queues)

    def add(self, row: Row) -> None:
        self.queues.add(row)

    def find(self, id_: str) -> Row | None:
        return self.running.get(id_) or self.queues.find(id_)

    def remove(self, row: Row) -> None:
        """Remove a row, waiting or running, and release its resources."""
        if self.running.pop(row.id, None) is not None:
            self.resources.release(row)
        self.queues.remove(row)
        self.waiting_for_adapter.pop(row.id, None)

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step, each with `scheduled` set; `now` is time.time()."""
        self._expire(now)
        current = list(self.running.values())
        decoding = [row for row in current if row.remaining == 1]
        batch, budget = self._schedule_decoding(decoding, prefilling=len(decoding) < len(current), now=now)
        self._mark_loaded(now)
        if self.waiting or len(decoding) < len(current):
            batch += self._schedule_prompts(budget, now)
        return [row for row in batch if row.id in self.running]

    def commit(self, row: Row, tokens: Sequence[int]) -> None:
        """Record a step of a row: its scheduled tokens are computed, and `tokens`, if any, are appended.

        The K/V of rejected draft tokens are overwritten by those of the next tokens.
        """
        row.computed += row.scheduled
        if tokens:
            row.computed += len(tokens) - 1 - len(row.draft)
            row.sampled = True
            row.tokens += tokens
            self.queues.charge(row, len(tokens))
        row.scheduled = 0
        row.draft = []
        if row.sampled and self.blocks.share_prefixes:
            hashes = block_hashes(row.salt, row.tokens, row.hashes)
            for i in range(row.computed // BLOCK - 1, -1, -1):
                if row.blocks[i] in self.blocks.hash_of:
                    break
                self.blocks.cache(row.blocks[i], hashes[i])
        if self.resources.rope_variant(row) != row.rope_variant:
            self.resources.discard_kv(row)

    def _schedule_decoding(self, rows: list[Row], *, prefilling: bool, now: float) -> tuple[list[Row], int]:
        """Schedule a token and draft tokens of each decoding row; return the batch and the budget left."""
        batch: list[Row] = []
        budget, drafts = self.max_batch_tokens, 0
        if not prefilling and not (self.waiting and len(rows) < self.max_seqs):  # else prompts use the budget
            drafts = min(MAX_DRAFT_TOKENS, budget - len(rows), self.max_row_draft * len(rows))
        min_acceptance = self.step_cost.min_acceptance(len(rows), drafts)
        for i, row in enumerate(rows):
            if budget and row.id in self.running and self._schedule_running(row, 1, now):
                batch.append(row)
                self._add_draft(row, drafts // (len(rows) - i), min_acceptance)
                drafts -= len(row.draft)
                budget -= row.scheduled
        return [row for row in batch if row.id in self.running], budget  # one may have been preempted since

    def _schedule_running(self, row: Row, count: int, now: float) -> bool:
        """Schedule `count` tokens of a running row, preempting for blocks. False if the row was preempted."""
        while not self.reserve_blocks(row, row.computed + count):
            victim = victim_for_growth(self.running.values(), self.queues)
            if victim is row and len(self.running) == 1:
                error = "The request needs more KV memory than this server has."
                self._end_unscheduled(row, InvalidRequest(error, param="max_tokens"))
                return False
            self._preempt(victim, now)
            if victim is row:
                return False
        row.scheduled = count
        return True

    def _add_draft(self, row: Row, limit: int, min_acceptance: float) -> None:
        """Schedule up to `limit` draft tokens that are likely enough, if there are free blocks for them."""
        limit = min(
            limit,
            self.max_row_draft,
            row.remaining_output(self.max_context) - 1,
            self.resources.tokens_until_rope_switch(row),
        )
        if row.grammar or limit < 1:
            return
        draft = row.lookup.draft(row.tokens, limit, min_acceptance)
        if self.reserve_blocks(row, row.computed + 1 + len(draft)):
            row.draft = draft
            row.scheduled += len(draft)

    def _preempt(self, row: Row, now: float) -> None:
        del self.running[row.id]
        self.resources.release(row)
        row.scheduled, row.draft = 0, []
        row.waits_for, row.waits_since = "capacity", now
        self.preemptions += 1
        self.queues.requeue(row)

    def _schedule_prompts(self, budget: int, now: float) -> list[Row]:
        """Schedule up to `budget` prompt tokens of rows in prefill and of waiting rows, in fair order."""
        batch: list[Row] = []
        prefilling = [row for row in self.running.values() if row.remaining > 1]
        order = self.queues.prefill_order(prefilling, self.max_seqs)
        blocked: Counter[str] = Counter()  # rows without memory; see _limit_overtaking
        while budget > 0 and (next_row := order.next()):
            row, is_running = next_row
            if is_running:
                count = min(row.remaining, budget)
                scheduled = row.id in self.running and self._schedule_running(row, count, now)
            else:
                scheduled = self._admit(row, order, blocked, budget, now)
            if scheduled:
                self._charge_prompt(row)
                batch.append(row)
                budget -= row.scheduled
        return batch

    def _charge_prompt(self, row: Row) -> None:
        """Charge the tenant for scheduled prompt tokens; not for cached or recomputed ones."""
        end = min(row.computed + row.scheduled, row.prompt_length)
        self.queues.charge(row, max(0, end - max(row.computed, row.charged_tokens)))
        row.charged_tokens = max(row.charged_tokens, end)

    def _admit(self, row: Row, order: PrefillOrder, blocked: Counter[str], budget: int, now: float) -> bool:
        """Start a waiting row if it gets slots, blocks and a place in the batch, by preemption if needed."""
        full = len(self.running) >= self.max_seqs
        if full and not self._victims(row):
            if self.queues.tenant_queue(row).running or self.resources.missing_blocks(row):
                order.skip_tenant(row)
            else:
                order.skip_waiting()  # no tenant has more than its share, so no row can be preempted
            return False
        if self._waits_for_sibling(row):
            row.wait("sibling", now)
            return False
        try:
            slots = self.resources.acquire(row)
        except PolypeftError as error:
            self._end_unscheduled(row, error)
            return False
        if slots is None and self.resources.loading(row):
            row.wait("adapter", now)
            self.waiting_for_adapter[row.id] = row
            return False
        row.wait("capacity", now)
        if slots and (misfit := self.resources.prepend_virtual_tokens(row, slots)):
            self.resources.release_slots(slots)
            self._end_unscheduled(row, misfit)
            return False
        if slots is None or not self._allocate(row, slots, now):
            self.resources.release_slots(slots or ())
            self._limit_overtaking(row, order, blocked, slot=slots is None)
            return False
        self._start(row, slots, min(row.remaining, budget), now)
        return True

    def _victims(self, row: Row) -> list[Row]:
        """Running rows to preempt so that this one can start; [] if it has to wait."""
        taker = self.queues.tenant_queue(row)
        if taker.running == len(self.running):
            return []
        victims = VictimSelector(self.running.values(), self.queues, self.blocks, taker, self.max_seqs)
        full = len(self.running) >= self.max_seqs
        return victims.find(needs_place=full, num_blocks=self.resources.missing_blocks(row))

    def _allocate(self, row: Row, slots: tuple[int, ...], now: float) -> bool:
        """Get a row that has its slots a place in the batch and blocks, preempting others if needed."""
        if len(self.running) < self.max_seqs and self.resources.allocate_blocks(row, slots):
            return True
        victims = self._victims(row)
        for victim in victims:
            self._preempt(victim, now)
        return bool(victims) and self.resources.allocate_blocks(row, slots)

    def _limit_overtaking(self, row: Row, order: PrefillOrder, blocked: Counter[str], *, slot: bool) -> None:
        """A row could not start without blocks, or a slot (`slot`): limit which rows may start before it.

        `blocked` counts such rows: by tenant if only rows of its own tenant can free a slot, else as "".
        """
        row.steps_without_memory += 1
        overtaken, queue = row.steps_without_memory > MAX_OVERTAKEN_STEPS, self.queues.tenant_queue(row)
        if slot and any(self.cache.waits_for_own_rows(use.adapter) for use in row.uses):
            # a row that was overtaken too long stops its tenant's other rows at once
            blocked[row.command.tenant] += MAX_ROWS_WITHOUT_MEMORY if overtaken else 1
            if blocked[row.command.tenant] >= MAX_ROWS_WITHOUT_MEMORY:
                order.skip_tenant(row)
            return
        blocked[""] += 1
        if (overtaken and not queue.running) or blocked[""] >= MAX_ROWS_WITHOUT_MEMORY:
            order.skip_waiting()  # if overtaken, the memory that is freed next is this row's
        elif overtaken:
            order.skip_tenant(row)

    def _start(self, row: Row, slots: tuple[int, ...], count: int, now: float) -> None:
        self.queues.start(row)
        self.running[row.id] = row
        row.slots = slots
        row.scheduled = count
        row.start(now)
        self.waiting_for_adapter.pop(row.id, None)
        if not row.admitted:
            row.admitted = True
            row.cached_tokens = row.computed

    def _end_unscheduled(self, row: Row, error: PolypeftError) -> None:
        self.remove(row)
        self.ended_unscheduled.append((row, error))

    def _mark_loaded(self, now: float) -> None:
        """Rows whose adapter has loaded wait for capacity now, also if this step does not get to them."""
        for row in [row for row in self.waiting_for_adapter.values() if not self.resources.loading(row)]:
            row.wait("capacity", now)
            del self.waiting_for_adapter[row.id]

    def _waits_for_sibling(self, row: Row) -> bool:
        """The choices of one prompt (n > 1) wait for the prefill of the first one, then share its blocks."""
        leader = self.find(row.command.after) if row.command.after else None
        return leader is not None and not leader.sampled

    def _expire(self, now: float) -> None:
        for row in [*self.running.values(), *self.queues]:
            if row.command.deadline is not None and row.command.deadline < now:
                error = DeadlineExceeded("The request's deadline passed before it was done.")
                self._end_unscheduled(row, error)
