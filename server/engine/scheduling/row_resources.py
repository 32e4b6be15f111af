"""What a row holds while it runs: a slot for each of its adapters, and KV blocks; all of it or nothing."""

from collections.abc import Sequence

from server.adapters.cache.combining import why_not_combinable
from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling.kv_blocks import BLOCK, BlockPool, block_hashes, blocks_for
from server.engine.scheduling.row import Row
from server.errors import ContextTooLong, InvalidField, PolypeftError


class RowResources:
    def __init__(
        self, cache: AdapterCache, blocks: BlockPool, max_context: int, rope_switches: Sequence[int] = ()
    ) -> None:
        """`rope_switches`: lengths past which a row's keys have other rotary frequencies (rotary.py)."""
        self.cache = cache
        self.blocks = blocks
        self.max_context = max_context
        self.rope_switches = rope_switches

    def acquire(self, row: Row) -> tuple[int, ...] | None:
        """A pinned slot for each adapter of a row; None if one is missing. Starts what loads are needed.

        Raises what ended a load.
        """
        slots: list[int] = []
        missing, again, row.asked = False, row.asked, True
        try:
            for use in row.uses:
                slot = self.cache.acquire(
                    use.adapter, weight=row.command.weight, row_slots=tuple(slots), again=again
                )
                missing |= slot is None
                slots += [] if slot is None else [slot]
        except PolypeftError:
            self.let_go(slots)
            raise
        if missing:
            self.let_go(slots)
            return None
        return tuple(slots)

    def let_go(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.cache.release(slot)

    def loading(self, row: Row) -> bool:
        return any(self.cache.is_loading(use.adapter) for use in row.uses)

    def lead(self, row: Row, slots: tuple[int, ...]) -> PolypeftError | None:
        """Put the adapter's virtual tokens before the text; why the row cannot run, if it cannot."""
        used = [self.cache.by_slot[slot] for slot in slots]
        row.lead_with(sum(resident.virtual_tokens for resident in used))
        text, virtual = row.prompt_length - row.virtual, row.virtual
        if row.prompt_length >= self.max_context:
            return ContextTooLong(
                f"The prompt has {text} tokens and the adapter puts {virtual} before them; "
                f"the context of {self.max_context} must hold one more.",
                param="prompt",
            )
        if row.command.adapters and (sentence := why_not_combinable(row.command.adapters, used)):
            return InvalidField(sentence, param="adapters")
        return None

    def lacking(self, row: Row) -> int:
        """Blocks that must come free, at most, before a waiting row can start."""
        return max(0, blocks_for(len(row.tokens)) - self.blocks.available)

    def take_blocks(self, row: Row, slots: tuple[int, ...]) -> bool:
        """Blocks for all of a row's tokens, cached ones first; all or none."""
        names: list[bytes] = []
        if (frequencies := self.frequencies(row)) != row.frequencies:
            row.hashes, row.frequencies = [], frequencies
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
        if any(self.cache.by_slot[slot].kv_precomputed for slot in slots) and row.computed < row.virtual:
            row.fill = row.computed
            row.computed = row.virtual
        return True

    def room(self, row: Row, tokens: int) -> bool:
        """Blocks for so many tokens of a running row, if they lie free."""
        fresh = self.blocks.allocate(max(0, blocks_for(tokens) - len(row.blocks)))
        if fresh is None:
            return False
        row.blocks += fresh
        return True

    def frequencies(self, row: Row) -> int:
        """Which set of rotary frequencies a row of its length has."""
        return sum(row.length > switch for switch in self.rope_switches)

    def until_switch(self, row: Row) -> int:
        """Tokens by which it may grow before its frequencies change."""
        return min((s - row.length for s in self.rope_switches if s >= row.length), default=self.max_context)

    def start_over(self, row: Row) -> None:
        """A running row has grown past a switch: all its keys are computed anew."""
        self.blocks.release(row.blocks)
        row.blocks, row.hashes, row.computed = [], [], 0
        row.frequencies = self.frequencies(row)
        if any(self.cache.by_slot[slot].kv_precomputed for slot in row.slots):
            row.fill, row.computed = 0, row.virtual

    def release(self, row: Row) -> None:
        """Everything; what it had computed is lost, but for what the prefix cache keeps."""
        self.blocks.release(row.blocks)
        self.let_go(row.slots)
        row.blocks, row.slots = [], ()
        row.computed = 0
        row.fill = None
