"""Which rows run in the next step, and with how many tokens. No torch, no I/O, no clock of its own.

Order of a step: decoding rows (one token each and draft tokens), then prompts until the token budget is
spent: by class (priority_queues.py), within a class by tenant (prefill_order.py), and of each tenant its rows
in prefill before its waiting rows. A row whose adapter is still loading is skipped. When the batch is full or
KV blocks run out, preemption.py chooses the row that goes back to its queue. Decoding rows of tenants that
have been served far too much come last: they get what is left.
"""

from collections.abc import Sequence

from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling import costs
from server.engine.scheduling.drafts import Drafts
from server.engine.scheduling.kv_blocks import BLOCK, BlockPool
from server.engine.scheduling.overtaking import Overtaking
from server.engine.scheduling.preemption import VictimSelector, victim_for_growth
from server.engine.scheduling.prefill_order import PrefillOrder, prefill_order
from server.engine.scheduling.priority_queues import PriorityQueues
from server.engine.scheduling.row import Row
from server.engine.scheduling.row_resources import RowResources
from server.engine.scheduling.step_cost import StepCost
from server.errors import DeadlineExceeded, InvalidRequest, PolypeftError

EXPIRY_SECONDS = 0.05  # between two looks at all rows' deadlines


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
        self.max_batch_tokens = max(max_batch_tokens, max_seqs + 1)  # a prompt's token beside a full batch
        self.max_context = max_context
        self.resources = RowResources(cache, blocks, max_context, rope_switches)
        self.reserve_blocks = self.resources.reserve_blocks
        self.max_row_draft = lookup_tokens if step_cost else 0
        self.step_cost = step_cost or StepCost()
        self.queues = PriorityQueues(
            BLOCK + max_context / BLOCK, costs.step_cost_bound(self.max_batch_tokens, max_seqs, max_context)
        )
        self.running: dict[str, Row] = {}  # in order of admission
        # rows that the scheduler has ended, until the engine reports them
        self.ended_unscheduled: list[tuple[Row, PolypeftError]] = []
        self.preemptions = 0
        self.waiting_for_adapter: dict[str, Row] = {}  # rows whose adapter is loading
        self._budget = 0  # tokens that are left in this step
        self._expired_at = -1.0  # when deadlines were looked at last
        self._selector = VictimSelector(self.running, self.queues, blocks, max_seqs)

    @property
    def waiting(self) -> int:
        return len(self.queues)

    def add(self, row: Row) -> None:
        self.queues.of(row).add(row)

    def find(self, id_: str) -> Row | None:
        return self.running.get(id_) or self.queues.find(id_)

    def remove(self, row: Row) -> None:
        """Remove a row, waiting or running, and release its resources."""
        if self.running.pop(row.id, None) is not None:
            self.resources.release(row)
        self.queues.of(row).remove(row)
        self._selector.reset()
        self.waiting_for_adapter.pop(row.id, None)

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step, each with `scheduled` set; `now` is time.time()."""
        self._expire(now)
        self._mark_loaded(now)
        self.queues.age(now)
        current = list(self.running.values())
        decoding = [row for row in current if row.remaining == 1]
        prefilling = len(decoding) < len(current)
        decoding, last = self._over_served_last(decoding)
        self._budget = self.max_batch_tokens
        batch = self._schedule_decoding(decoding, prefilling=prefilling, now=now)
        if self.waiting or prefilling:
            batch += self._schedule_prompts(now)
        if last:
            batch += self._schedule_decoding(last, prefilling=True, now=now)
        # some may have been preempted since, and some of those started again
        return [row for row in dict.fromkeys(batch) if row.id in self.running]

    def commit(self, row: Row, tokens: Sequence[int]) -> None:
        """Record a step of a row: its scheduled tokens are computed, and `tokens`, if any, are appended.

        The K/V of rejected draft tokens are overwritten by those of the next tokens.
        """
        row.computed += row.scheduled
        if tokens:
            row.computed += len(tokens) - 1 - len(row.draft)
            row.sampled = True
            row.tokens += tokens
            self.queues.of(row).charge(row, costs.GENERATED_TOKEN * len(tokens))
        row.scheduled = 0
        row.draft = []
        if row.sampled and self.blocks.share_prefixes:
            self.resources.cache_blocks(row)
        if self.resources.rope_variant(row) != row.rope_variant:
            self.resources.discard_kv(row)

    def _over_served_last(self, decoding: list[Row]) -> tuple[list[Row], list[Row]]:
        """Split off the rows of tenants of which a waiting row may take any place."""
        over = [queues.over_served() for queues in self.queues.classes]
        if not any(over):
            return decoding, []
        late = [row for row in decoding if row.command.tenant in over[row.level]]
        return [row for row in decoding if row not in late], late

    def _schedule_decoding(self, rows: list[Row], *, prefilling: bool, now: float) -> list[Row]:
        """Schedule a token and draft tokens of each decoding row, as far as the budget goes."""
        batch: list[Row] = []
        # while rows in prefill, or waiting ones with a place, could use the budget, there are no drafts
        no_drafts = prefilling or (self.waiting and len(rows) < self.max_seqs)
        spare = 0 if no_drafts else self._budget - len(rows) - 1
        drafts = Drafts(self.resources, self.step_cost, len(rows), spare, self.max_row_draft)
        for row in rows:
            if self._budget and row.id in self.running and self._schedule_running(row, 1, now):
                batch.append(row)
                drafts.add(row)
                self._budget -= row.scheduled
        return batch

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

    def _preempt(self, row: Row, now: float) -> None:
        del self.running[row.id]
        self.resources.release(row)
        self._budget += row.scheduled
        row.scheduled, row.draft = 0, []
        row.waits_for, row.waits_since = "capacity", now
        self.preemptions += 1
        self._selector.reset()
        self.queues.of(row).requeue(row)

    def _schedule_prompts(self, now: float) -> list[Row]:
        """Schedule prompt tokens of rows in prefill and of waiting rows, class by class."""
        batch: list[Row] = []
        prefilling = [row for row in self.running.values() if row.remaining > 1]
        starts = True
        for level, queues in enumerate(self.queues.classes):
            of_class = [row for row in prefilling if row.level == level]
            if not of_class and not queues.waiting:
                continue
            order = prefill_order(queues, of_class, self.max_seqs - self.queues.running_before(level))
            if not starts:
                order.skip_waiting()
            batch += self._schedule_in_order(order, now)
            starts = starts and not order.stopped
        return batch

    def _schedule_in_order(self, order: PrefillOrder, now: float) -> list[Row]:
        """Schedule prompt tokens of one class until the budget is spent."""
        batch: list[Row] = []
        overtaking = Overtaking(self.cache)
        self._selector.reset()
        while self._budget > 0 and (next_row := order.next()):
            row, is_running = next_row
            if is_running:
                count = min(row.remaining, self._budget)
                scheduled = row.id in self.running and self._schedule_running(row, count, now)
            else:
                scheduled = self._admit(row, order, overtaking, now)
            if scheduled:
                self.queues.of(row).charge_prompt(row)
                batch.append(row)
                self._budget -= row.scheduled
        return batch

    def _admit(self, row: Row, order: PrefillOrder, overtaking: Overtaking, now: float) -> bool:
        """Start a waiting row if it gets slots, blocks and a place in the batch, by preemption if needed."""
        if len(self.running) >= self.max_seqs and not self._victims(row):
            order.refuse(self.queues.tenant_queue(row))
            return False
        if self._waits_for_sibling(row):
            self._hold(row, "sibling", now)
            return False
        try:
            slots = self.resources.acquire(row)
            if slots is None and self._free_slot(row, now):
                slots = self.resources.acquire(row)
        except PolypeftError as error:
            self._end_unscheduled(row, error)
            return False
        if slots is None and self.resources.loading(row):
            self._hold(row, "adapter", now)
            self.waiting_for_adapter[row.id] = row
            return False
        row.wait("capacity", now)
        self.queues.of(row).release(row)
        if slots and (misfit := self.resources.prepend_virtual_tokens(row, slots)):
            self.resources.release_slots(slots)
            self._end_unscheduled(row, misfit)
            return False
        if slots is None or not self._allocate(row, slots, now):
            self.resources.release_slots(slots or ())
            overtaking.limit(row, self.queues.tenant_queue(row), order, slot=slots is None)
            return False
        self._start(row, slots, min(row.remaining, self._budget), now)
        return True

    def _hold(self, row: Row, reason: str, now: float) -> None:
        row.wait(reason, now)
        self.queues.of(row).hold(row)

    def _victims(self, row: Row) -> list[Row]:
        """Running rows to preempt so that this one can start; [] if it has to wait."""
        taker, full = self.queues.tenant_queue(row), len(self.running) >= self.max_seqs
        if taker.running == len(self.running) or (full and not self._selector.may_take(row.level, taker)):
            return []
        missing = self.resources.missing_blocks(row)
        return self._selector.find(row.level, taker, needs_place=full, num_blocks=missing)

    def _free_slot(self, row: Row, now: float) -> bool:
        """Preempt the rows that use a slot which this row's tenant is entitled to, if there is one."""
        if self.resources.loading(row) or any(self.cache.waits_for_own_rows(use.adapter) for use in row.uses):
            return False
        victims = self._selector.find_slot(row.level, self.queues.tenant_queue(row))
        for victim in victims:
            self._preempt(victim, now)
        return bool(victims)

    def _allocate(self, row: Row, slots: tuple[int, ...], now: float) -> bool:
        """Get a row that has its slots a place in the batch and blocks, preempting others if needed."""
        if len(self.running) < self.max_seqs and self.resources.allocate_blocks(row, slots):
            return True
        victims = self._victims(row)
        for victim in victims:
            self._preempt(victim, now)
        return bool(victims) and self.resources.allocate_blocks(row, slots)

    def _start(self, row: Row, slots: tuple[int, ...], count: int, now: float) -> None:
        queues = self.queues.of(row)
        queues.start(row)
        self._selector.reset()
        self.running[row.id] = row
        row.slots = slots
        row.scheduled = count
        row.start(now)
        self.waiting_for_adapter.pop(row.id, None)
        if not row.admitted:
            row.admitted = True
            row.cached_tokens = row.computed
            queues.charge_cached(row)
        queues.charge_load(row, self.resources.take_uncharged_bytes(slots))

    def _end_unscheduled(self, row: Row, error: PolypeftError) -> None:
        self.remove(row)
        self.ended_unscheduled.append((row, error))

    def _mark_loaded(self, now: float) -> None:
        """Rows whose adapter has loaded wait for capacity now, also if this step does not get to them."""
        for row in [row for row in self.waiting_for_adapter.values() if not self.resources.loading(row)]:
            row.wait("capacity", now)
            self.queues.of(row).release(row)
            del self.waiting_for_adapter[row.id]

    def _waits_for_sibling(self, row: Row) -> bool:
        """The choices of one prompt (n > 1) wait for the prefill of the first one, then share its blocks."""
        leader = self.find(row.command.after) if row.command.after else None
        return leader is not None and not leader.sampled

    def _expire(self, now: float) -> None:
        if 0 <= now - self._expired_at < EXPIRY_SECONDS:
            return
        self._expired_at = now
        for row in [*self.running.values(), *self.queues]:
            if row.command.deadline is not None and row.command.deadline < now:
                error = DeadlineExceeded("The request's deadline passed before it was done.")
                self._end_unscheduled(row, error)
