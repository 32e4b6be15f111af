"""A batch as a GPU's kernels need it: a few tables on the device, filled with one copy.

In an eager step the tables are as large as the batch. In a CUDA graph (cuda_graphs.py) they lie at fixed
addresses and are as long as the recorded number of rows; unused rows have length 0 and KV position -1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, takewhile

import torch

from server.adapters.methods.token_spans import MAX_DECODE_SPAN
from server.engine.scheduling.row import Row
from server.kernels.cpu.paged_attention import BLOCK, AttentionOptions
from server.kernels.transfers import upload


@dataclass(frozen=True)
class GpuBatch:
    """All tensors int64. Tokens are packed as in ForwardContext: rows that decode come first."""

    kv_positions: torch.Tensor  # [T]: where each token's K and V are written; negative: nowhere
    lengths: torch.Tensor  # [decoding tokens]: how many tokens each sees, itself included
    tables: torch.Tensor  # [decoding tokens, then rows in prefill; most blocks]: their blocks
    chunks: (
        torch.Tensor
    )  # [programs, 4]: of rows in prefill, as `cut_chunks` of gpu/prefill_attention.py says

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "GpuBatch":
        """Leading rows of at most MAX_DECODE_SPAN tokens decode, each token by itself; all later ones are
        chunks.
        """
        from server.kernels.gpu.prefill_attention import cut_chunks  # Triton is not everywhere

        decoding = [*takewhile(lambda row: row.scheduled <= MAX_DECODE_SPAN, rows)]
        owners = [row for row in decoding for _ in range(row.scheduled)]
        spans, start = [], len(owners)
        for row in rows[len(decoding) :]:
            spans.append((len(owners), start, row.scheduled, row.computed))
            owners.append(row)
            start += row.scheduled
        width = max(len(row.blocks) for row in rows)
        positions, lengths, tables, chunks = upload(
            [
                [kv_position(row, row.computed + i) for row in rows for i in range(row.scheduled)],
                [row.computed + 1 + i for row in decoding for i in range(row.scheduled)],
                [*chain.from_iterable(row.blocks + [0] * (width - len(row.blocks)) for row in owners)],
                cut_chunks(spans),
            ],
            device,
        )
        return cls(positions, lengths, tables.view(-1, width), chunks.view(-1, 4))

    def attend(
        self,
        q: torch.Tensor,  # [T, heads, head_dim]
        k: torch.Tensor,  # [T, kv_heads, head_dim]
        v: torch.Tensor,
        keys: torch.Tensor,  # one layer's pages (paged_attention.py)
        values: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Write K and V to their pages, then attend over them: [T, heads, head_dim]."""
        from server.kernels.gpu.decode_attention import decode_attention, write_pages
        from server.kernels.gpu.prefill_attention import chunk_attention

        out = q.new_empty(q.shape)
        decoding = self.lengths.shape[0]
        write_pages(keys, values, k, v, self.kv_positions)
        if decoding:
            past = (self.tables[:decoding], self.lengths)
            decode_attention(q[:decoding], keys, values, *past, options, out[:decoding])
        chunk_attention(q, keys, values, self.tables, self.chunks, options, out)
        return out


def kv_position(row: Row, token: int) -> int:
    """block * BLOCK + offset: where K and V of the row's token with this index lie in the pages."""
    return row.blocks[token // BLOCK] * BLOCK + token % BLOCK
