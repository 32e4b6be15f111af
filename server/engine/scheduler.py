"""Which rows run in the next step, and with how many tokens. No torch, no I/O, no clock of its own.

Order of a step: rows that decode (one token each), then rows still in prefill, then newcomers, until the
token budget is spent. Newcomers come in the order of queues.py. A row whose adapter is on its way is passed
by; when KV blocks run out the row admitted last goes back to its queue.
"""

from collections import Counter
from collections.abc import Sequence

from server.adapters.cache import AdapterCache
from server.adapters.stack import no_meaning
from server.engine.costs import USUAL, Costs
from server.engine.kv import BLOCK, BlockPool, block_hashes, blocks_for
from server.engine.queues import Queues
from server.engine.row import Row
from server.errors import ContextTooLong, DeadlineExceeded, InvalidField, InvalidRequest, PolypeftError

PATIENCE = 32  # steps in which a row may lack memory before later rows stop overtaking it
GUESSES = 48  # tokens guessed in a step, all rows together
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
        costs: Costs | None = None,
        rope_switches: Sequence[int] = (),
    ) -> None:
        """`rope_switches`: lengths past which a row's keys have other rotary frequencies (rotary.py)."""
        self.cache = cache
        self.blocks = blocks
        self.max_seqs = max_seqs
        self.max_batch_tokens = max(max_batch_tokens, max_seqs)
        self.max_context = max_context
        self.lookup = lookup if costs else 0  # tokens that a row may guess at a time
        self.costs = costs or Costs(USUAL)  # None: a guess saves nothing here
        self.rope_switches = rope_switches
        self.queues = Queues()
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
            self._release(row)
        else:
            self.queues.remove(row)
        self.cold.pop(row.id, None)
        self.queues.forget_idle({row.command.tenant for row in self.running.values()})

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step, each with `scheduled` set; `now` is time.time()."""
        self._expire(now)
        budget = self.max_batch_tokens
        batch: list[Row] = []
        current = list(self.running.values())
        decoding = [row for row in current if row.remaining == 1]
        prompts = len(decoding) < len(current) or (self.waiting and len(current) < self.max_seqs)
        spare = 0 if prompts else min(GUESSES, budget - len(decoding), self.lookup * len(decoding))
        worth = self.costs.worth(len(decoding), spare)
        for i, row in enumerate(decoding + [row for row in current if row.remaining > 1]):
            if budget and row.id in self.running and self._continue(row, min(row.remaining, budget), now):
                batch.append(row)
                if i < len(decoding):
                    self._guess(row, spare // (len(decoding) - i), worth)
                    spare -= len(row.guess)
                budget -= row.scheduled
        # A preempted row may already stand in the batch.
        batch = [row for row in batch if row.id in self.running]
        self._note_loaded(now)
        self._admit(batch, budget, now)
        return batch

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
        if self.rope_switches and self._frequencies(row) != row.frequencies:
            self._start_over(row)

    def room(self, row: Row, tokens: int) -> bool:
        """Blocks for so many tokens of a running row, if they lie free."""
        fresh = self.blocks.allocate(max(0, blocks_for(tokens) - len(row.blocks)))
        if fresh is None:
            return False
        row.blocks += fresh
        return True

    def _continue(self, row: Row, count: int, now: float) -> bool:
        """Room for `count` more tokens of a running row, if need be at the expense of later rows."""
        while not self.room(row, row.computed + count):
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

    def _guess(self, row: Row, most: int, worth: float) -> None:
        """Schedule what may come next along with a row's token, if that is likely enough to be `worth` it and
        memory for it lies free.
        """
        most = min(most, self.lookup, row.left(self.max_context) - 1)
        for switch in self.rope_switches:  # a guess past it would have other frequencies than its row
            if switch >= row.length:
                most = min(most, switch - row.length)
        if row.grammar or most < 1:
            return
        guess = row.lookup.guess(row.tokens, most, worth)
        if self.room(row, row.computed + 1 + len(guess)):
            row.guess = guess
            row.scheduled += len(guess)

    def _frequencies(self, row: Row) -> int:
        return sum(row.length > switch for switch in self.rope_switches)

    def _start_over(self, row: Row) -> None:
        """A running row has grown past a switch: all its keys are computed anew."""
        self.blocks.release(row.blocks)
        row.blocks, row.hashes, row.computed = [], [], 0
        row.frequencies = self._frequencies(row)
        if any(self.cache.by_slot[slot].given for slot in row.slots):
            row.fill, row.computed = 0, row.virtual

    def _preempt(self, row: Row, now: float) -> None:
        del self.running[row.id]
        self._release(row)
        row.scheduled, row.guess = 0, []
        row.waits_for, row.since = "capacity", now
        self.preemptions += 1
        self.queues.put_back(row)

    def _release(self, row: Row) -> None:
        self.blocks.release(row.blocks)
        row.blocks = []
        row.computed = 0
        row.fill = None
        self._let_go(row.slots)
        row.slots = ()

    def _admit(self, batch: list[Row], budget: int, now: float) -> None:
        lacking = 0
        own: Counter[str] = Counter()  # rows that wait for room their own tenant takes: no other's business
        for row in self.queues.candidates():
            if budget <= 0 or len(self.running) >= self.max_seqs or lacking >= TRIES:
                return
            if own[row.command.tenant] >= TRIES:
                continue
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
                row.passed_over += 1
                late = row.passed_over > PATIENCE
                if slots is None and any(self.cache.waits_for_itself(use.adapter) for use in row.uses):
                    own[row.command.tenant] += TRIES if late else 1  # late: none of its rows overtakes
                    continue
                if late:
                    return  # the memory that comes free next is this row's
                lacking += 1
                continue
            self._start(row, slots, min(row.remaining, budget), now)
            batch.append(row)
            budget -= row.scheduled

    def _start(self, row: Row, slots: tuple[int, ...], count: int, now: float) -> None:
        self.queues.remove(row)
        self.queues.charge(row, row.remaining)
        self.running[row.id] = row
        row.slots = slots
        row.scheduled = count
        row.start(now)
        self.cold.pop(row.id, None)
        if not row.admitted:
            row.admitted = True
            row.cached = row.computed

    def _acquire(self, row: Row) -> tuple[int, ...] | None:
        """A pinned slot for each adapter of a row; all or none. Starts what loads are needed."""
        slots: list[int] = []
        missing, again, row.asked = False, row.asked, True
        try:
            for use in row.uses:
                slot = self.cache.acquire(
                    use.adapter, weight=row.command.weight, mine=tuple(slots), again=again
                )
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
        if self.rope_switches and self._frequencies(row) != row.frequencies:
            row.hashes, row.frequencies = [], self._frequencies(row)
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

    def _expire(self, now: float) -> None:
        for row in [*self.running.values(), *self.queues]:
            if row.command.deadline is not None and row.command.deadline < now:
                self.remove(row)
                self.ended.append(
                    (row, DeadlineExceeded("The request's deadline passed before it was done."))
                )
