"""Bottlenecks by pointer against their plain twin, on a GPU or under Triton's interpreter."""

import math

import pytest
import torch

from server.adapters.methods.bottleneck_bank import BottleneckDelta, apply, table_row
from server.kernels.cpu.grouped_bottleneck import COLUMNS, INPUTS, NON_LINEARITIES
from server.kernels.token_blocks import LARGE_BLOCK, SMALL_BLOCK
from tests.fixtures.gpu import DEVICE, TOLERANCE, needs_triton
from tests.server.kernels.gpu.test_grouped_affine import plan_of

pytestmark = [
    needs_triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy's, whose 1 / inf is 0, too
]

HIDDEN = 72
TOKENS = 90
KINDS = [(width, name, eps) for width, name in zip((1, 5, 64), INPUTS, strict=True) for eps in (0.0, 0.1)]
SPANS = [(1, 0, 1), (2, 89, 90), (3, 4, 6), (4, 8, 78), (5, 78, 79), (6, 80, 82), (7, 83, 84)]


def change(
    width: int, non_linearity: str, input_: str, epsilon: float, dtype: torch.dtype
) -> BottleneckDelta:
    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*shape)).to(DEVICE, dtype)

    return BottleneckDelta(
        site="",
        down=random(width, HIDDEN, scale=1 / math.sqrt(HIDDEN)),
        down_bias=random(width),
        up=random(width, HIDDEN, scale=1 / math.sqrt(width)),
        up_bias=random(HIDDEN),
        non_linearity=non_linearity,
        input=input_,  # type: ignore[arg-type]
        epsilon=epsilon,
    )


def in_float(own: BottleneckDelta) -> BottleneckDelta:
    parts = (own.down.float(), own.down_bias.float(), own.up.float(), own.up_bias.float())
    return BottleneckDelta("", *parts, own.non_linearity, own.input, own.epsilon)


@pytest.mark.parametrize("size", [SMALL_BLOCK, LARGE_BLOCK])
@pytest.mark.parametrize(
    ("dtype", "non_linearity"),
    [(torch.float32, name) for name in NON_LINEARITIES] + [(torch.bfloat16, "gelu"), (torch.float16, "silu")],
)
def test_every_token_gets_its_own_adapter(non_linearity: str, dtype: torch.dtype, size: int) -> None:
    from server.kernels.gpu.grouped_bottleneck import grouped_bottleneck

    torch.manual_seed(0)
    changes = [change(width, non_linearity, name, eps, dtype) for width, name, eps in KINDS]
    tables = torch.zeros(len(changes) + 2, 3, COLUMNS, dtype=torch.int64)
    for slot, own in enumerate(changes, start=1):
        tables[slot, 1] = torch.tensor(table_row(own))
    h, r = torch.randn(TOKENS, HIDDEN).to(DEVICE, dtype), 2 * torch.randn(TOKENS, HIDDEN).to(DEVICE, dtype)
    before, residual, expected = h.clone(), r.clone(), h.float()
    touched = torch.zeros(TOKENS, dtype=torch.bool)
    for slot, start, end in SPANS:
        if slot <= len(changes):  # slot 7 holds nothing
            touched[start:end] = True
            apply(in_float(changes[slot - 1]), expected[start:end], r[start:end].float())
    grouped_bottleneck(h, r, plan_of(SPANS, size, 64), tables.to(DEVICE), 1)
    scale = max(1.0, float(expected.abs().max()) / 4)
    torch.testing.assert_close(h.float(), expected, atol=scale * TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(h[~touched], before[~touched])
    assert torch.equal(r, residual)
