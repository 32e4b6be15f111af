"""The inputs of a CUDA graph: tables at fixed addresses on the device, filled from the host."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from server.engine.model.batch_tables import kv_position
from server.engine.scheduling.row import Row
from server.kernels.token_blocks import BLOCK_FIELDS, SMALL_BLOCK, put_in_blocks


@dataclass
class HostBuffer:
    """A host copy of a graph's tables, page-locked where the device is CUDA."""

    host: torch.Tensor  # int64, flat
    parts: "list[np.ndarray[Any, Any]]"  # views of it, one a table
    written: list[tuple[list[int], int]]  # by row: the block list in the table, and how much of it
    copied: Any = None  # a CUDA event: the last copy to the device has ended

    def write_blocks(self, table: "np.ndarray[Any, Any]", i: int, blocks: list[int]) -> None:
        """Write row i's blocks. A running row's list only grows, so of the same list only the end is new."""
        before, count = self.written[i]
        first = count if before is blocks and count <= len(blocks) else 0
        table[first : len(blocks)] = blocks[first:]
        self.written[i] = (blocks, len(blocks))


class GraphTables:
    """Inputs of a recorded step of up to `rows` rows, int64 at fixed addresses; filled by one copy from the
    host.

    | ids | positions | lengths | KV positions | order and blocks of each bank | block tables |

    Two host buffers are used in turns, so that the previous copy may still be under way.
    """

    def __init__(self, rows: int, banks: int, max_blocks: int, device: torch.device) -> None:
        self.rows = rows
        small = rows * (4 + banks * (1 + BLOCK_FIELDS))
        size, page_locked = small + rows * max_blocks, device.type == "cuda"
        self.flat = torch.zeros(size, dtype=torch.int64, device=device)
        self.parts = self._split(self.flat, banks, max_blocks)
        self.parts[3][:] = -1  # while the step is recorded it writes K/V nowhere
        hosts = [torch.zeros(size, dtype=torch.int64, pin_memory=page_locked) for _ in range(2)]
        self.buffers = [
            HostBuffer(
                host, [part.numpy() for part in self._split(host, banks, max_blocks)], [([], 0)] * rows
            )
            for host in hosts
        ]

    def _split(self, flat: torch.Tensor, banks: int, max_blocks: int) -> list[torch.Tensor]:
        sizes = [self.rows] * 4 + [self.rows, self.rows * BLOCK_FIELDS] * banks + [self.rows * max_blocks]
        parts = list(torch.split(flat, sizes))
        return [*parts[:-1], parts[-1].view(self.rows, max_blocks)]

    def fill(
        self,
        rows: list[Row],
        token_positions: list[int],
        tokens: list[int] | torch.Tensor,
        spans: list[list[tuple[int, int, int]]],
    ) -> None:
        """Set the step: each row decodes one of `tokens`, at its position in `token_positions`.

        `tokens`: [rows], on the device if the host does not know them yet. `spans`: of each bank, which rows
        use which slot, as (slot, first row, end).
        """
        n = len(rows)
        buffer, other = self.buffers
        self.buffers = [other, buffer]
        if buffer.copied:
            buffer.copied.synchronize()  # ended long ago, unless copies of adapters delay it
        ids, positions, lengths, kv_positions, *plans, blocks = buffer.parts
        ids[:n] = 0 if isinstance(tokens, torch.Tensor) else tokens
        positions[:n] = token_positions
        lengths[:n] = positions[:n] + 1
        kv_positions[:n] = [kv_position(row, p) for row, p in zip(rows, token_positions, strict=True)]
        ids[n:] = positions[n:] = lengths[n:] = 0
        kv_positions[n:] = -1
        for i, of_bank in enumerate(spans):
            filled = put_in_blocks(of_bank, SMALL_BLOCK)
            for table, values in zip(plans[2 * i : 2 * i + 2], filled, strict=True):
                table[: len(values)] = values
                table[len(values) :] = 0
        for i, row in enumerate(rows):
            buffer.write_blocks(blocks[i], i, row.blocks)
        self.flat.copy_(buffer.host, non_blocking=True)
        if self.flat.is_cuda:
            buffer.copied = buffer.copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            buffer.copied.record()
        if isinstance(tokens, torch.Tensor):
            self.parts[0][:n].copy_(tokens)
