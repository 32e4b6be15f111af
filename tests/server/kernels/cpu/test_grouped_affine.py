import pytest
import torch

from server.adapters.methods.affine_bank import apply, table_row
from server.adapters.methods.affine_layout import AffineDelta
from server.adapters.sites import Site
from server.kernels.cpu.grouped_affine import COLUMNS, grouped_affine, supports_bfloat16
from server.kernels.cpu.openmp import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the fast path needs Linux, numba and OpenMP")

IN = 37  # no multiple of anything
WIDTHS = [53, 16, 7]  # three sites that see the same x
SITES = [Site(f"site {i}", "linear", IN, width, True) for i, width in enumerate(WIDTHS)]
# rank, gain, bias; of seven slots, the last of which has matrices nowhere
KINDS = [(1, 0, 0), (3, 1, 0), (8, 0, 1), (16, 1, 1), (61, 0, 0), (0, 1, 1), (0, 0, 1)]


def change(inputs: int, outputs: int, rank: int, scaled: int, biased: int) -> AffineDelta:
    return AffineDelta(
        "site",
        a=torch.randn(rank, inputs) if rank else None,
        b=torch.randn(rank, outputs) if rank else None,
        gain=torch.randn(outputs) if scaled else None,
        bias=torch.randn(outputs) if biased else None,
    )


def table_of(changes: list[list[AffineDelta]]) -> torch.Tensor:
    """[slots + 2, sites, COLUMNS] of the changes of each slot from 1 on; the last slot holds nothing."""
    table = torch.zeros(len(changes) + 2, len(changes[0]), COLUMNS, dtype=torch.int64)
    for slot, own in enumerate(changes, start=1):
        table[slot] = torch.tensor([table_row(one) for one in own])
    return table


@pytest.mark.parametrize("base_bias", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2])
def test_every_token_gets_its_own_adapter(base_bias: bool, first: int) -> None:
    torch.manual_seed(0)
    changes = [[change(IN, width, *kind) for width in WIDTHS] for kind in KINDS]
    table = table_of(changes)
    widths = WIDTHS[first:]
    bias = torch.randn(sum(widths)) if base_bias else None
    x, y = torch.randn(20, IN), torch.randn(20, sum(widths))
    # runs of one slot: alone, two, and more than a tile takes
    tokens = torch.tensor([0, 19, 4, 5, 6, 7, 8, 9, 11, 13, 14, 12])
    slots = torch.tensor([1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6, 8])
    expected = y.clone()
    for token, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        at = 0
        for site, width in zip(range(first, 3), widths, strict=True):
            columns = slice(at, at + width)
            own = None if bias is None else bias[columns]
            if slot <= len(changes):
                given, out = x[token : token + 1], expected[token : token + 1, columns]
                apply(changes[slot - 1][site], SITES[site], given, out, own)
            at += width
    grouped_affine(x, y, tokens, slots, table, first, widths, bias)
    torch.testing.assert_close(y, expected, atol=2e-4, rtol=1e-5)
    untouched = [t for t in range(20) if t not in tokens.tolist()] + [12]
    assert torch.equal(y[untouched], expected[untouched])


@pytest.mark.parametrize("width", [48, 53])
@pytest.mark.parametrize("inputs", [5, 37, 64])
def test_a_token_gets_the_same_bits_alone_and_among_others(inputs: int, width: int) -> None:
    torch.manual_seed(0)
    changes = [[change(inputs, width, *kind)] for kind in KINDS]  # the table holds addresses of them
    table = table_of(changes)
    x, y = torch.randn(40, inputs), torch.randn(40, width)
    slots = torch.arange(40) % len(KINDS) + 1
    slots, tokens = slots.sort()
    alone, together = y.clone(), y.clone()
    for token, slot in zip(tokens, slots, strict=True):
        grouped_affine(x, alone, token[None], slot[None], table, 0, [width], None)
    grouped_affine(x, together, tokens, slots, table, 0, [width], None, has_matrices=True)
    assert torch.equal(alone, together)
    assert not torch.equal(together, y)


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 61])
def test_bfloat16_gives_the_bits_of_the_same_in_float32(rank: int) -> None:
    torch.manual_seed(0)
    assert supports_bfloat16(64, 96)
    assert not supports_bfloat16(64, 80)
    half = AffineDelta("site", a=torch.randn(rank, 64).bfloat16(), b=torch.randn(rank, 96).bfloat16())
    assert half.a is not None
    assert half.b is not None
    whole = AffineDelta("site", a=half.a.float(), b=half.b.float())
    x, y = torch.randn(20, 64), torch.randn(20, 96)
    slots, tokens = (torch.arange(20) // 7 % 2 + 1).sort()  # runs of several, and of one
    given = []
    for pair in ([half, half], [whole, whole], [half, whole]):
        table = table_of([[own] for own in pair])
        given.append(y.clone())
        grouped_affine(x, given[-1], tokens, slots, table, 0, [96], None)
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0], given[2])
    expected = y.clone()
    apply(half, Site("site", "linear", 64, 96, False), x, expected, None)
    torch.testing.assert_close(given[0], expected, atol=2e-4, rtol=1e-5)
