"""The paged KV cache: its tensors, and where a row's tokens lie in them.

Pages are drawn in server/kernels/cpu/paged_attention.py; the scheduler decides which blocks a row owns
(scheduling/kv_blocks.py).
"""

from dataclasses import dataclass

import torch

from server.adapters.sites import Base
from server.engine.scheduling.row import Row
from server.kernels.cpu.paged_attention import BLOCK


class KvPages:
    """K and V of all layers, in blocks: as many blocks as fit into `budget` bytes, at least two.

    Of each layer keys [blocks, kv_heads, head_dim, BLOCK] and values [blocks, kv_heads, BLOCK, head_dim].
    """

    def __init__(self, base: Base, device: torch.device, dtype: torch.dtype, budget: int) -> None:
        per_block = 2 * base.layers * base.kv_heads * base.head_dim * BLOCK * dtype.itemsize
        self.count = max(budget // per_block, 2)
        shape = (self.count, base.kv_heads)
        # Zeroed: a page never shows what an earlier process left in memory.
        self.keys = [
            torch.zeros(*shape, base.head_dim, BLOCK, device=device, dtype=dtype) for _ in range(base.layers)
        ]
        self.values = [
            torch.zeros(*shape, BLOCK, base.head_dim, device=device, dtype=dtype) for _ in range(base.layers)
        ]


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens [start, end) of the packed batch, of one row in prefill: the last of its `length` tokens."""

    start: int
    end: int
    length: int  # tokens of the row so far, this chunk included
    blocks: torch.Tensor  # int64: the row's blocks, in order
    kv_positions: torch.Tensor  # int64 [end - start]: where their K/V are written (see `kv_positions`)


def prefill_chunk(row: Row, start: int, end: int, device: torch.device) -> PrefillChunk:
    """The row's scheduled tokens, which are tokens [start, end) of the packed batch."""
    length = row.computed + row.scheduled
    blocks = torch.tensor(row.blocks[: -(-length // BLOCK)], device=device)
    return PrefillChunk(start, end, length, blocks, kv_positions(row.blocks, row.computed, length, device))


def kv_positions(blocks: list[int], first: int, end: int, device: torch.device) -> torch.Tensor:
    """int64 [end - first], block * BLOCK + offset: where K/V of a row's tokens [first, end) lie."""
    tokens = torch.arange(first, end, device=device)
    return torch.tensor(blocks, device=device)[tokens // BLOCK] * BLOCK + tokens % BLOCK
