"""Grouped adapters by pointer against their plain twin, on a GPU or under Triton's interpreter."""

from typing import Any

import pytest
import torch

from server.adapters.methods.affine_bank import apply, table_row
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.sites import Site
from server.kernels.cpu.grouped_affine import COLUMNS
from server.kernels.token_blocks import BLOCK_FIELDS, LARGE_BLOCK, SMALL_BLOCK, BlockPlan, put_in_blocks
from tests.fixtures.gpu import DEVICE, TOLERANCE, needs_triton

pytestmark = needs_triton

IN = 72
RANKS = [1, 3, 8, 16, 61, 0]  # of the slots, shifted by one from site to site; 0: no matrices
TOKENS = 90
SPANS = [(1, 0, 1), (2, 89, 90), (3, 4, 6), (4, 8, 78), (5, 78, 79), (6, 80, 82), (3, 84, 85), (7, 86, 87)]


def change(rank: int, outputs: int, slot: int, dtype: torch.dtype) -> AffineDelta:
    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape)).to(DEVICE, dtype)

    return AffineDelta(
        "",
        a=random(rank, IN, scale=IN**-0.5) if rank else None,
        b=random(rank, outputs, scale=rank**-0.5) if rank else None,
        gain=random(outputs) if slot % 2 else None,
        bias=random(outputs) if slot % 3 else None,
    )


def plan_of(spans: list[tuple[int, int, int]], size: int, ranks: int, spare: int = 2) -> BlockPlan:
    """With `spare` empty blocks and places at the end, as a recorded step has them."""
    order, blocks = put_in_blocks(spans, size)
    return BlockPlan(
        torch.tensor(order + [0] * spare, device=DEVICE),
        torch.tensor(blocks + [0] * BLOCK_FIELDS * spare, device=DEVICE).view(-1, BLOCK_FIELDS),
        size,
        ranks,
    )


def expected_of(
    x: torch.Tensor,
    y: torch.Tensor,
    changes: dict[tuple[int, int], AffineDelta],
    outputs: list[int],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """By the twin, in float32."""
    found = y.float()
    for slot, start, end in SPANS:
        at = 0
        for i, width in enumerate(outputs):
            columns = slice(at, at + width)
            at += width
            if own := changes.get((slot, i)):
                parts: dict[str, Any] = {
                    name: None if (t := getattr(own, name)) is None else t.float()
                    for name in ("a", "b", "gain", "bias")
                }
                apply(
                    AffineDelta("", **parts),
                    Site("", "linear", IN, width, True),
                    x[start:end].float(),
                    found[start:end, columns],
                    None if bias is None else bias[columns].float(),
                )
    return found


@pytest.mark.parametrize(
    ("size", "outputs", "dtype"),
    [
        (SMALL_BLOCK, [53], torch.float32),
        (SMALL_BLOCK, [56, 24, 24], torch.bfloat16),
        (SMALL_BLOCK, [56, 24], torch.float16),
        (LARGE_BLOCK, [300, 40], torch.float32),
        (LARGE_BLOCK, [56, 24, 24], torch.bfloat16),
    ],
)
def test_every_token_gets_its_own_adapter(size: int, outputs: list[int], dtype: torch.dtype) -> None:
    from server.kernels.gpu.grouped_affine import grouped_affine

    torch.manual_seed(0)
    first = 1  # the group is not the first in the tables
    tables = torch.zeros(len(RANKS) + 2, first + len(outputs) + 1, COLUMNS, dtype=torch.int64)
    changes = {
        (slot, i): change(RANKS[(slot + i) % len(RANKS)], width, slot, dtype)
        for slot in range(1, len(RANKS) + 1)
        for i, width in enumerate(outputs)
    }
    for (slot, i), own in changes.items():
        tables[slot, first + i] = torch.tensor(table_row(own))
    tables = tables.to(DEVICE)
    x = torch.randn(TOKENS, IN).to(DEVICE, dtype)
    wide = torch.randn(TOKENS, sum(outputs) + 8).to(DEVICE, dtype)
    y, bias = wide[:, : sum(outputs)], torch.randn(sum(outputs)).to(DEVICE, dtype)
    for base_bias in (None, bias):
        before, found = y.clone(), wide.clone()
        expected = expected_of(x, before, changes, outputs, base_bias)
        grouped_affine(
            x, found[:, : sum(outputs)], plan_of(SPANS, size, 64), tables, first, outputs, base_bias
        )
        ours = found[:, : sum(outputs)].float()
        scale = max(1.0, float(expected.abs().max()) / 4)
        torch.testing.assert_close(ours, expected, atol=scale * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        touched = torch.zeros(TOKENS, dtype=torch.bool)
        for slot, start, end in SPANS:
            touched[start:end] = slot <= len(RANKS)  # slot 7 holds nothing
        assert torch.equal(ours[~touched], before[~touched].float())
        assert torch.equal(found[:, sum(outputs) :], wide[:, sum(outputs) :])


def test_a_row_is_the_same_bit_for_bit_beside_others() -> None:
    from server.kernels.gpu.grouped_affine import grouped_affine

    torch.manual_seed(1)
    own = change(16, 40, 1, torch.float32)
    tables = torch.zeros(3, 1, COLUMNS, dtype=torch.int64)
    tables[1, 0] = tables[2, 0] = torch.tensor(table_row(own))
    tables = tables.to(DEVICE)
    x, y = torch.randn(20, IN, device=DEVICE), torch.randn(20, 40, device=DEVICE)
    together, alone = y.clone(), y.clone()
    grouped_affine(x, together, plan_of([(1, 0, 18), (2, 18, 20)], SMALL_BLOCK, 64), tables, 0, [40], None)
    for i in range(20):
        grouped_affine(x, alone, plan_of([(2, i, i + 1)], SMALL_BLOCK, 16, spare=0), tables, 0, [40], None)
    assert torch.equal(together, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_looks_rows_up(dtype: torch.dtype) -> None:
    from server.kernels.gpu.grouped_affine import grouped_affine

    torch.manual_seed(2)
    changes = [
        AffineDelta("", torch.randn(30, rank).to(DEVICE, dtype), torch.randn(rank, 24).to(DEVICE, dtype))
        for rank in (2, 16, 33)
    ]
    tables = torch.zeros(4, 1, COLUMNS, dtype=torch.int64)
    for slot, own in enumerate(changes, start=1):
        tables[slot, 0] = torch.tensor(table_row(own))
    ids = torch.randint(30, (12,), device=DEVICE)
    ids[:3] = torch.tensor([-1, -2, -3])  # virtual tokens
    spans = [(1, 0, 5), (2, 6, 7), (3, 8, 12)]
    y = torch.randn(12, 24).to(DEVICE, dtype)
    expected = y.float()
    site = Site("", "embedding", 30, 24, False)
    for slot, start, end in spans:
        own = AffineDelta("", changes[slot - 1].a.float(), changes[slot - 1].b.float())  # type: ignore[union-attr]
        apply(own, site, ids[start:end], expected[start:end], None)
    grouped_affine(ids, y, plan_of(spans, SMALL_BLOCK, 64), tables.to(DEVICE), 0, [24], None)
    scale = float(expected.abs().max())
    torch.testing.assert_close(y.float(), expected, atol=scale * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_nobody_costs_nothing() -> None:
    from server.kernels.gpu.grouped_affine import grouped_affine

    x, y = torch.randn(3, IN, device=DEVICE), torch.randn(3, 8, device=DEVICE)
    before = y.clone()
    tables = torch.zeros(2, 1, COLUMNS, dtype=torch.int64, device=DEVICE)
    grouped_affine(x, y, plan_of([], SMALL_BLOCK, 16, spare=0), tables, 0, [8], None)
    grouped_affine(x, y, plan_of([], SMALL_BLOCK, 16, spare=3), tables, 0, [8], None)
    grouped_affine(x, y, plan_of([(1, 0, 2)], SMALL_BLOCK, 16), tables, 0, [8], None)  # an empty slot
    assert torch.equal(y, before)
