import math

import pytest
import torch

from server.adapters.methods.bottleneck_bank import BottleneckDelta, apply, table_row
from server.kernels.cpu.grouped_bottleneck import COLUMNS, INPUTS, NON_LINEARITIES, grouped_bottleneck
from server.kernels.cpu.openmp import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the fast path needs Linux, numba and OpenMP")

HIDDEN = 37  # no multiple of anything


def change(width: int, non_linearity: str, input_: str, epsilon: float) -> BottleneckDelta:
    return BottleneckDelta(
        site="",
        down=torch.randn(width, HIDDEN) / math.sqrt(HIDDEN),
        down_bias=torch.randn(width),
        up=torch.randn(width, HIDDEN) / math.sqrt(width),
        up_bias=torch.randn(HIDDEN),
        non_linearity=non_linearity,
        input=input_,  # type: ignore[arg-type]
        epsilon=epsilon,
    )


@pytest.mark.parametrize("non_linearity", NON_LINEARITIES)
def test_every_token_gets_its_own_adapter(non_linearity: str) -> None:
    torch.manual_seed(0)
    kinds = [
        (width, input_, epsilon)
        for width, input_ in zip((1, 5, 64), INPUTS, strict=True)
        for epsilon in (0.0, 0.1)
    ]
    changes = [change(width, non_linearity, input_, epsilon) for width, input_, epsilon in kinds]
    table = torch.zeros(len(changes) + 2, COLUMNS, dtype=torch.int64)
    for slot, own in enumerate(changes, start=1):
        table[slot] = torch.tensor(table_row(own))
    h, r = torch.randn(20, HIDDEN), 2 * torch.randn(20, HIDDEN)
    tokens = torch.tensor([0, 19, 4, 5, 6, 11, 12, 13])
    slots = torch.tensor([1, 2, 3, 3, 4, 5, 6, 7])  # slot 7 holds nothing
    expected = h.clone()
    for token, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        if slot <= len(changes):
            apply(changes[slot - 1], expected[token : token + 1], r[token : token + 1])
    untouched = [token for token in range(20) if token not in tokens.tolist()] + [13]
    before, residual = h.clone(), r.clone()
    grouped_bottleneck(h, r, tokens, slots, table)
    torch.testing.assert_close(h, expected, atol=1e-5, rtol=1e-5)
    assert (h[tokens[:7]] != before[tokens[:7]]).any(1).all()
    assert torch.equal(h[untouched], before[untouched])
    assert torch.equal(r, residual)


@pytest.mark.parametrize("width", [3, 64])  # wider ones are computed by vectors, with their own exp
def test_large_values_overflow_as_the_twin_does(width: int) -> None:
    torch.manual_seed(0)
    for non_linearity in NON_LINEARITIES:
        own = change(width, non_linearity, "output", 0.0)
        table = torch.tensor([[0] * COLUMNS, table_row(own)])
        h, r = 1e4 * torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)
        expected = h.clone()
        apply(own, expected, r)
        grouped_bottleneck(h, r, torch.tensor([0, 1]), torch.tensor([1, 1]), table)
        torch.testing.assert_close(h, expected, atol=1e-1, rtol=1e-4)
