"""Which rows run in the next step, and with how many tokens. No torch, no I/O, no clock of its own.

Order of a step: rows that decode (one token each), then prompts, until the token budget is spent: tenant by
tenant in the order of fair_queue.py, of each its rows in prefill and then its newcomers. A row whose adapter
is on its way is passed by. When places or KV blocks run out, preemption.py says which row goes back to its
queue.
"""

from collections import Counter
from collections.abc import Sequence

from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling.fair_queue import FairQueue, Turns
from server.engine.scheduling.kv_blocks import BLOCK, BlockPool, block_hashes
from server.engine.scheduling.preemption import Victims, for_growth
from server.engine.scheduling.row import Row
from server.engine.scheduling.row_resources import RowResources
from server.engine.scheduling.step_cost import USUAL, StepCost
from server.errors import DeadlineExceeded, InvalidRequest, PolypeftError

MAX_ADAPTER_WAIT_STEPS = 32  # steps in which a row may lack memory before later rows stop overtaking it
MAX_DRAFT_TOKENS = 48  # tokens guessed in a step, all rows together
TRIES = 8  # rows that may lack memory in one step before the others are not even asked


class Scheduler:
    def __init__(
        self,
        cache: AdapterCache,
        blocks: BlockPool,
        *,
        max_seqs: int,
        max_batch_tokens: int,
        max_context: int,
        lookup: int = 0,
        costs: StepCost | None = None,
        rope_switches: Sequence[int] = (),
    ) -> None:
        self.cache = cache
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max(max_batch_tokens, max_seqs)
        self.max_context = max_context
        self.resources = RowResources(cache, blocks, max_context, rope_switches)
        self.room = self.resources.room
        self.lookup = lookup if costs else 0  # tokens that a row may guess at a time
        self.costs = costs or StepCost(USUAL)  # None: a guess saves nothing here
        self.queues = FairQueue()
        self.running: dict[str, Row] = {}  # in order of admission
        self.ended: list[tuple[Row, PolypeftError]] = []  # without a step; the loop takes them
        self.preemptions = 0
        self.cold: dict[str, Row] = {}  # rows that wait for an adapter's load

    @property
    def waiting(self) -> int:
        return len(self.queues)

    def add(self, row: Row) -> None:
        self.queues.add(row)

    def find(self, id_: str) -> Row | None:
        return self.running.get(id_) or self.queues.find(id_)

    def remove(self, row: Row) -> None:
        """Forget a row, wherever it is, and give back all it holds."""
        if self.running.pop(row.id, None) is not None:
            self.resources.release(row)
        self.queues.drop(row)
        self.cold.pop(row.id, None)

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step, each with `scheduled` set; `now` is time.time()."""
        self._expire(now)
        budget = self.max_batch_tokens
        batch: list[Row] = []
        current = list(self.running.values())
        decoding = [row for row in current if row.remaining == 1]
        prompts = len(decoding) < len(current) or (self.waiting and len(current) < self.max_seqs)
        spare = 0 if prompts else min(MAX_DRAFT_TOKENS, budget - len(decoding), self.lookup * len(decoding))
        worth = self.costs.worth(len(decoding), spare)
        for i, row in enumerate(decoding):
            if budget and row.id in self.running and self._continue(row, 1, now):
                batch.append(row)
                self._guess(row, spare // (len(decoding) - i), worth)
                spare -= len(row.guess)
                budget -= row.scheduled
        batch = [row for row in batch if row.id in self.running]  # one may have been preempted since
        self._note_loaded(now)
        if self.waiting or len(decoding) < len(current):
            batch += self._prompts(budget, now)
        return [row for row in batch if row.id in self.running]

    def commit(self, row: Row, tokens: Sequence[int]) -> None:
        """Record a row's step: what it had to compute is computed, and these `tokens`, if any, come next.

        The K/V of guesses that were wrong are written over by what comes in their place.
        """
        row.computed += row.scheduled
        if tokens:
            row.computed += len(tokens) - 1 - len(row.guess)
            row.sampled = True
            row.tokens += tokens
            self.queues.charge(row, len(tokens))
        row.scheduled = 0
        row.guess = []
        if row.sampled and self.blocks.share_prefixes:
            names = block_hashes(row.salt, row.tokens, row.hashes)
            for i in range(row.computed // BLOCK - 1, -1, -1):
                if row.blocks[i] in self.blocks.names:
                    break
                self.blocks.name(row.blocks[i], names[i])
        if self.resources.frequencies(row) != row.frequencies:
            self.resources.start_over(row)

    def _continue(self, row: Row, count: int, now: float) -> bool:
        """Room for `count` more tokens of a running row, if need be at the expense of another."""
        while not self.room(row, row.computed + count):
            victim = for_growth(self.running.values(), self.queues)
            if victim is row and len(self.running) == 1:
                error = "The request needs more KV memory than this server has."
                self._refuse(row, InvalidRequest(error, param="max_tokens"))
                return False
            self._preempt(victim, now)
            if victim is row:
                return False
        row.scheduled = count
        return True

    def _guess(self, row: Row, most: int, worth: float) -> None:
        """Schedule what may come next along with a row's token, if that is likely enough to be `worth` it and
        memory for it lies free.
        """
        most = min(most, self.lookup, row.left(self.max_context) - 1, self.resources.until_switch(row))
        if row.grammar or most < 1:
            return
        guess = row.lookup.guess(row.tokens, most, worth)
        if self.room(row, row.computed + 1 + len(guess)):
            row.guess = guess
            row.scheduled += len(guess)

    def _preempt(self, row: Row, now: float) -> None:
        del self.running[row.id]
        self.resources.release(row)
        row.scheduled, row.guess = 0, []
        row.waits_for, row.since = "capacity", now
        self.preemptions += 1
        self.queues.put_back(row)

    def _prompts(self, budget: int, now: float) -> list[Row]:
        """Rows whose prompts get tokens in this step, tenant by tenant: those in prefill, then newcomers."""
        batch: list[Row] = []
        prefilling = [row for row in self.running.values() if row.remaining > 1]
        turns = self.queues.turns(prefilling, self.max_seqs)
        lacking: Counter[str] = Counter()  # rows without memory: by tenant if the rest is its own, or ""
        while budget > 0 and (found := turns.next()):
            row, begun = found
            if begun:
                count = min(row.remaining, budget)
                taken = row.id in self.running and self._continue(row, count, now)
            else:
                taken = self._admit(row, turns, lacking, budget, now)
            if taken:
                self._charge_prompt(row)
                batch.append(row)
                budget -= row.scheduled
        return batch

    def _charge_prompt(self, row: Row) -> None:
        """For what was not computed before: nobody pays for a recompute, or for what the cache had."""
        end = min(row.computed + row.scheduled, row.prompt_length)
        self.queues.charge(row, max(0, end - max(row.computed, row.charged)))
        row.charged = max(row.charged, end)

    def _admit(self, row: Row, turns: Turns, lacking: Counter[str], budget: int, now: float) -> bool:
        """Start a row that waits, if it has all that it needs, or others are to give way to it."""
        full = len(self.running) >= self.max_seqs
        if full and not self._victims(row):
            if self.queues.of(row).running or self.resources.lacking(row):
                turns.pass_by(row)
            else:
                turns.close()  # nobody has more than its part, whoever asks
            return False
        if self._waits_for_sibling(row):
            row.wait("sibling", now)
            return False
        try:
            slots = self.resources.acquire(row)
        except PolypeftError as error:
            self._refuse(row, error)
            return False
        if slots is None and self.resources.loading(row):
            row.wait("adapter", now)
            self.cold[row.id] = row
            return False
        row.wait("capacity", now)
        if slots and (misfit := self.resources.lead(row, slots)):
            self.resources.let_go(slots)
            self._refuse(row, misfit)
            return False
        if slots is None or not self._make_room(row, slots, now):
            self.resources.let_go(slots or ())
            self._note_lack(row, turns, lacking, slot=slots is None)
            return False
        self._start(row, slots, min(row.remaining, budget), now)
        return True

    def _victims(self, row: Row) -> list[Row]:
        """Running rows that give way to this one, so that it can start; [] if it has to wait."""
        taker = self.queues.of(row)
        if taker.running == len(self.running):
            return []
        victims = Victims(self.running.values(), self.queues, self.blocks, taker, self.max_seqs)
        full = len(self.running) >= self.max_seqs
        return victims.find(place=full, blocks=self.resources.lacking(row))

    def _make_room(self, row: Row, slots: tuple[int, ...], now: float) -> bool:
        """A place and blocks for a row that has its slots, if need be at the expense of others."""
        if len(self.running) < self.max_seqs and self.resources.take_blocks(row, slots):
            return True
        victims = self._victims(row)
        for victim in victims:
            self._preempt(victim, now)
        return bool(victims) and self.resources.take_blocks(row, slots)

    def _note_lack(self, row: Row, turns: Turns, lacking: Counter[str], *, slot: bool) -> None:
        """A row could not start for want of blocks, or of a slot: who may still overtake it in this step."""
        row.passed_over += 1
        late, queue = row.passed_over > MAX_ADAPTER_WAIT_STEPS, self.queues.of(row)
        if slot and any(self.cache.waits_for_own_rows(use.adapter) for use in row.uses):
            lacking[row.command.tenant] += TRIES if late else 1
            if lacking[row.command.tenant] >= TRIES:  # late: none of its tenant's rows overtakes
                turns.pass_by(row)
            return
        lacking[""] += 1
        if (late and not queue.running) or lacking[""] >= TRIES:
            turns.close()  # late: the memory that comes free next is this row's
        elif late:
            turns.pass_by(row)

    def _start(self, row: Row, slots: tuple[int, ...], count: int, now: float) -> None:
        self.queues.start(row)
        self.running[row.id] = row
        row.slots = slots
        row.scheduled = count
        row.start(now)
        self.cold.pop(row.id, None)
        if not row.admitted:
            row.admitted = True
            row.cached = row.computed

    def _refuse(self, row: Row, error: PolypeftError) -> None:
        self.remove(row)
        self.ended.append((row, error))

    def _note_loaded(self, now: float) -> None:
        """Rows whose adapter has come wait for room, also while nobody looks at them."""
        for row in [row for row in self.cold.values() if not self.resources.loading(row)]:
            row.wait("capacity", now)
            del self.cold[row.id]

    def _waits_for_sibling(self, row: Row) -> bool:
        """Choices of one prompt wait for the first one's prefill, then share its blocks."""
        leader = self.find(row.command.after) if row.command.after else None
        return leader is not None and not leader.sampled

    def _expire(self, now: float) -> None:
        for row in [*self.running.values(), *self.queues]:
            if row.command.deadline is not None and row.command.deadline < now:
                self._refuse(row, DeadlineExceeded("The request's deadline passed before it was done."))
