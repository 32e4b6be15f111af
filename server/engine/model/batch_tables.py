"""A step's rows as a GPU's kernels need them: a few tables on the device, filled with one copy.

In an eager step the tables are as large as the batch. In a recorded one (cuda_graphs.py) they lie at fixed
addresses, for as many rows as were recorded; rows that are not there have no tokens and no place.
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
    """All int64. Tokens are packed as in Step: rows that decode first."""

    places: torch.Tensor  # [T]: where each token's K and V go; negative: nowhere
    lengths: torch.Tensor  # [tokens that decode]: what each sees, itself included
    tables: torch.Tensor  # [tokens that decode, then rows in prefill; most]: their blocks
    chunks: torch.Tensor  # [programs, 4]: of rows in prefill, as kernels/triton_prefill.py has them

    @classmethod
    def of(cls, rows: Sequence[Row], device: torch.device) -> "GpuBatch":
        """The first rows that have few tokens decode, each token for itself; from then on, chunks."""
        from server.kernels.gpu.prefill_attention import cut_chunks  # Triton is not everywhere

        decoding = [*takewhile(lambda row: row.scheduled <= MAX_DECODE_SPAN, rows)]
        owners = [row for row in decoding for _ in range(row.scheduled)]
        spans, start = [], len(owners)
        for row in rows[len(decoding) :]:
            spans.append((len(owners), start, row.scheduled, row.computed))
            owners.append(row)
            start += row.scheduled
        most = max(len(row.blocks) for row in rows)
        places, lengths, tables, chunks = upload(
            [
                [place_of(row, row.computed + i) for row in rows for i in range(row.scheduled)],
                [row.computed + 1 + i for row in decoding for i in range(row.scheduled)],
                [*chain.from_iterable(row.blocks + [0] * (most - len(row.blocks)) for row in owners)],
                cut_chunks(spans),
            ],
            device,
        )
        return cls(places, lengths, tables.view(-1, most), chunks.view(-1, 4))

    def attend(
        self,
        q: torch.Tensor,  # [T, heads, head_dim]
        k: torch.Tensor,  # [T, kv_heads, head_dim]
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scores: AttentionOptions,
    ) -> torch.Tensor:
        """K and V go into their pages, then each token looks at its row's past: [T, heads, head_dim]."""
        from server.kernels.gpu.decode_attention import decode_attention, write_pages
        from server.kernels.gpu.prefill_attention import chunk_attention

        out = q.new_empty(q.shape)
        decoding = self.lengths.shape[0]
        write_pages(keys, values, k, v, self.places)
        if decoding:
            own = (self.tables[:decoding], self.lengths)
            decode_attention(q[:decoding], keys, values, *own, scores, out[:decoding])
        chunk_attention(q, keys, values, self.tables, self.chunks, scores, out)
        return out


def place_of(row: Row, at: int) -> int:
    """Where the K and V of a row's token `at` lie in the pages."""
    return row.blocks[at // BLOCK] * BLOCK + at % BLOCK
