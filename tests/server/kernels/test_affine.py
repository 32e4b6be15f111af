import pytest
import torch

from server.adapters.methods.affine import Change, apply
from server.adapters.sites import Site
from server.kernels.affine import COLUMNS, grouped_affine
from server.kernels.openmp import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the fast path needs Linux, numba and OpenMP")

IN, OUT = 37, 53  # no multiple of anything
SITE = Site("site", "linear", IN, OUT, True)


def change(rank: int, scaled: bool, biased: bool) -> Change:
    return Change(
        "site",
        a=torch.randn(rank, IN) if rank else None,
        b=torch.randn(rank, OUT) if rank else None,
        gain=torch.randn(OUT) if scaled else None,
        bias=torch.randn(OUT) if biased else None,
    )


@pytest.mark.parametrize("base_bias", [False, True])
def test_every_token_gets_its_own_adapter(base_bias: bool) -> None:
    torch.manual_seed(0)
    kinds = [(1, False, False), (3, True, False), (8, False, True), (16, True, True), (61, False, False)]
    changes = [change(*kind) for kind in [*kinds, (0, True, True), (0, False, True)]]
    table = torch.zeros(len(changes) + 2, COLUMNS, dtype=torch.int64)
    for slot, own in enumerate(changes, start=1):
        parts = (own.a, own.b, own.gain, own.bias)
        rank = 0 if own.b is None else own.b.shape[0]
        table[slot] = torch.tensor([*(0 if t is None else t.data_ptr() for t in parts), rank])
    bias = torch.randn(OUT) if base_bias else None
    x, y = torch.randn(20, IN), torch.randn(20, OUT)
    tokens = torch.tensor([0, 19, 4, 5, 6, 11, 13, 14, 12])
    slots = torch.tensor([1, 2, 3, 3, 4, 5, 6, 7, 8])  # slot 8 holds nothing
    expected = y.clone()
    for token, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        if slot <= len(changes):
            apply(changes[slot - 1], SITE, x[token : token + 1], expected[token : token + 1], bias)
    grouped_affine(x, y, tokens, slots, table, bias)
    torch.testing.assert_close(y, expected, atol=2e-4, rtol=1e-5)
    untouched = [t for t in range(20) if t not in tokens.tolist()] + [12]
    assert torch.equal(y[untouched], expected[untouched])
