"""Which token sees what, whatever order short and long rows come in."""

import pytest
import torch

from server.engine.model.batch_tables import GpuBatch
from server.engine.scheduling.row import Row
from server.kernels.cpu.paged_attention import (
    BLOCK,
    AttentionOptions,
    gather_pages,
    prefill_attention,
    write_pages,
)
from server.messages import Generate, Sampling
from tests.fixtures.gpu import DEVICE, needs_triton

pytestmark = needs_triton


def row_of(blocks: list[int], computed: int, scheduled: int) -> Row:
    tokens = list(range(computed + scheduled))
    row = Row(Generate("row", "tenant", tokens, Sampling(max_tokens=1)), 0, tokens, len(tokens))
    row.blocks, row.computed, row.scheduled = blocks, computed, scheduled
    return row


@pytest.mark.parametrize(
    "shape",
    [
        [(5, 1), (20, 3), (31, 1), (7, 12), (0, 2)],  # (computed, scheduled): the last is a short chunk
        [(16, 1), (15, 1)],
        [(3, 9), (40, 17)],
    ],
)
@pytest.mark.parametrize("scores", [AttentionOptions(0.3), AttentionOptions(0.3, window=6)])
def test_each_token_sees_its_own_row(shape: list[tuple[int, int]], scores: AttentionOptions) -> None:
    torch.manual_seed(0)
    heads, kv_heads, dim = 4, 2, 16
    need = [-(-sum(pair) // BLOCK) for pair in shape]
    order = torch.randperm(sum(need)).tolist()
    rows = [row_of([order.pop() for _ in range(n)], *pair) for n, pair in zip(need, shape, strict=True)]
    keys = torch.randn(sum(need), kv_heads, dim, BLOCK, device=DEVICE)
    values = torch.randn(sum(need), kv_heads, BLOCK, dim, device=DEVICE)
    tokens = sum(row.scheduled for row in rows)
    q = torch.randn(tokens, heads, dim, device=DEVICE)
    k, v = torch.randn(2, tokens, kv_heads, dim, device=DEVICE)
    twins = (keys.clone(), values.clone())
    batch = GpuBatch.of(rows, DEVICE)
    found = batch.attend(q, k, v, keys, values, scores)
    write_pages(*twins, k, v, batch.kv_positions)
    assert torch.equal(keys, twins[0])
    start = 0
    for row in rows:
        end, length = start + row.scheduled, row.computed + row.scheduled
        past = gather_pages(*twins, torch.tensor(row.blocks, device=DEVICE), length)
        expected = prefill_attention(q[start:end], *past, scores)
        torch.testing.assert_close(found[start:end], expected, atol=1e-5, rtol=1e-5)
        start = end
