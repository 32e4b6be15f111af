"""What a row holds while it runs: an adapter slot for each of its adapters, and KV blocks.

A row gets all slots and all blocks that it needs, or none.
"""

from collections.abc import Sequence

from server.adapters.cache.combining import why_not_combinable
from server.adapters.cache.device_cache import AdapterCache
from server.engine.scheduling.kv_blocks import BLOCK, BlockPool, block_hashes, blocks_for
from server.engine.scheduling.row import Row
from server.errors import ContextTooLong, InvalidField, PolypeftError


class RowResources:
    """Acquires and releases the slots and blocks of rows."""

    def __init__(
        self, cache: AdapterCache, blocks: BlockPool, max_context: int, rope_switches: Sequence[int] = ()
    ) -> None:
        """`rope_switches`: row lengths above which keys are computed with other rotary frequencies."""
        self.cache = cache
        self.blocks = blocks
        self.max_context = max_context
        self.rope_switches = rope_switches

    def acquire(self, row: Row) -> tuple[int, ...] | None:
        """A pinned slot for each adapter of a row; None if one is missing. Starts the loads that are needed.

        Raises the error of a load that has failed.
        """
        slots: list[int] = []
        missing, again, row.use_counted = False, row.use_counted, True
        try:
            for use in row.uses:
                slot = self.cache.acquire(
                    use.adapter, weight=row.command.weight, row_slots=tuple(slots), again=again
                )
                missing |= slot is None
                slots += [] if slot is None else [slot]
        except PolypeftError:
            self.release_slots(slots)
            raise
        if missing:
            self.release_slots(slots)
            return None
        return tuple(slots)

    def release_slots(self, slots: Sequence[int]) -> None:
        for slot in slots:
            self.cache.release(slot)

    def loading(self, row: Row) -> bool:
        return any(self.cache.is_loading(use.adapter) for use in row.uses)

    def prepend_virtual_tokens(self, row: Row, slots: tuple[int, ...]) -> PolypeftError | None:
        """Put the virtual tokens of the row's adapters before its prompt; the error if it cannot run then."""
        residents = [self.cache.by_slot[slot] for slot in slots]
        row.prepend_virtual_tokens(sum(resident.virtual_tokens for resident in residents))
        text, virtual = row.prompt_length - row.num_virtual_tokens, row.num_virtual_tokens
        if row.prompt_length + min(row.command.sampling.max_tokens, 1) > self.max_context:
            return ContextTooLong(
                f"The prompt has {text} tokens and the adapter puts {virtual} before them; "
                f"the context of {self.max_context} must hold one more.",
                param="prompt",
            )
        if row.command.adapters and (sentence := why_not_combinable(row.command.adapters, residents)):
            return InvalidField(sentence, param="adapters")
        return None

    def missing_blocks(self, row: Row) -> int:
        """Blocks that must be freed before a waiting row can start, without hits in the prefix cache."""
        return max(0, blocks_for(len(row.tokens)) - self.blocks.available)

    def allocate_blocks(self, row: Row, slots: tuple[int, ...]) -> bool:
        """Give a row blocks for all its tokens, cached ones first. False, and none, if too few are free."""
        hashes: list[bytes] = []
        if (variant := self.rope_variant(row)) != row.rope_variant:
            row.hashes, row.rope_variant = [], variant
        if self.blocks.share_prefixes:
            # At least one token is computed, so that there are logits to sample from.
            reusable = row.unscored.start if row.unscored else len(row.tokens) - 1
            hashes = block_hashes(row.salt, row.tokens, row.hashes)[: reusable // BLOCK]
        shared = self.blocks.match(hashes)
        fresh = self.blocks.allocate(blocks_for(len(row.tokens)) - len(shared))
        if fresh is None:
            self.blocks.release(shared)
            return False
        if not row.admitted:
            self.blocks.queries += len(row.tokens)
            self.blocks.hits += len(shared) * BLOCK
        row.blocks = shared + fresh
        row.computed = len(shared) * BLOCK
        if self._has_precomputed_kv(slots) and row.computed < row.num_virtual_tokens:
            row.write_virtual_from = row.computed
            row.computed = row.num_virtual_tokens
        return True

    def reserve_blocks(self, row: Row, tokens: int) -> bool:
        """Extend the blocks of a running row to `tokens` tokens. False if too few are free."""
        fresh = self.blocks.allocate(max(0, blocks_for(tokens) - len(row.blocks)))
        if fresh is None:
            return False
        row.blocks += fresh
        return True

    def rope_variant(self, row: Row) -> int:
        """Index of the set of rotary frequencies that applies to a row of this length."""
        return sum(row.length > switch for switch in self.rope_switches)

    def tokens_until_rope_switch(self, row: Row) -> int:
        """Tokens that the row may grow by before other rotary frequencies apply to it."""
        return min((s - row.length for s in self.rope_switches if s >= row.length), default=self.max_context)

    def cache_blocks(self, row: Row) -> None:
        """Put the row's computed full blocks into the prefix cache; those before the last in it are there."""
        hashes = block_hashes(row.salt, row.tokens, row.hashes)
        for i in range(row.computed // BLOCK - 1, -1, -1):
            if row.blocks[i] in self.blocks.hash_of:
                break
            self.blocks.cache(row.blocks[i], hashes[i])

    def take_uncharged_bytes(self, slots: Sequence[int]) -> int:
        """Bytes of the adapters in these slots whose load no tenant has been charged for until now."""
        loaded = [self.cache.by_slot[slot] for slot in slots if not self.cache.by_slot[slot].charged]
        for resident in loaded:
            resident.charged = True
        return sum(resident.nbytes for resident in loaded)

    def discard_kv(self, row: Row) -> None:
        """Drop the K/V of a running row that has grown past a RoPE switch: all are computed again."""
        self.blocks.release(row.blocks)
        row.blocks, row.hashes, row.computed = [], [], 0
        row.rope_variant = self.rope_variant(row)
        if self._has_precomputed_kv(row.slots):
            row.write_virtual_from, row.computed = 0, row.num_virtual_tokens

    def release(self, row: Row) -> None:
        """Give back all slots and blocks. Computed K/V survive in the prefix cache only."""
        self.blocks.release(row.blocks)
        self.release_slots(row.slots)
        row.blocks, row.slots = [], ()
        row.computed = 0
        row.write_virtual_from = None

    def _has_precomputed_kv(self, slots: Sequence[int]) -> bool:
        """An adapter in these slots brings the K/V of its virtual tokens (prefix tuning)."""
        return any(self.cache.by_slot[slot].kv_precomputed for slot in slots)
