"""Biases of each token's own come with a linear or a norm, as if they were added afterwards."""

import pytest
import torch

from server.adapters.methods.affine_bank import table_row
from server.adapters.methods.affine_layout import AffineDelta
from server.kernels.cpu.float32_linear import Float32Linear
from server.kernels.cpu.fused_bias import Biases
from server.kernels.cpu.grouped_affine import COLUMNS, grouped_affine
from server.kernels.cpu.int8.linear import Int8Linear
from server.kernels.cpu.int8.vnni_linear import VnniLinear
from server.kernels.cpu.llama_ops import RmsNorm
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.packed_linear import PackedLinear

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")

IN = 40
WIDTHS = [64, 130, 50]  # the second leaves a gap after it
# of a slot: rank, gain, bias
KINDS = [(0, 0, 1), (0, 0, 0), (4, 0, 1), (0, 1, 1), (0, 0, 1)]
TOKENS = 300


def changes() -> list[list[AffineDelta]]:
    return [
        [
            AffineDelta(
                "site",
                a=torch.randn(rank, IN) if rank else None,
                b=torch.randn(rank, width) if rank else None,
                gain=torch.randn(width) if scaled else None,
                bias=torch.randn(width) if biased else None,
            )
            for width in WIDTHS
        ]
        for rank, scaled, biased in KINDS
    ]


def table_of(own: list[list[AffineDelta]]) -> torch.Tensor:
    table = torch.zeros(len(own) + 1, len(WIDTHS), COLUMNS, dtype=torch.int64)
    for slot, sites in enumerate(own, start=1):
        table[slot] = torch.tensor([table_row(change) for change in sites])
    return table


def lone_bias(change: AffineDelta, width: int) -> torch.Tensor:
    alone = change.b is None and change.gain is None and change.bias is not None
    return change.bias if alone and change.bias is not None else torch.zeros(width)


@pytest.mark.parametrize("kind", [Float32Linear, Int8Linear, VnniLinear])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("count", [1, 3, 16, 64, TOKENS])
def test_a_linear_adds_them(kind: type[PackedLinear], with_bias: bool, count: int) -> None:
    torch.manual_seed(count)
    members = [kind.of(torch.randn(n, IN), torch.randn(n) if with_bias else None) for n in WIDTHS]
    joint, columns = kind.join(members)
    own = changes()
    table, slots = table_of(own), torch.arange(count) % (len(KINDS) + 1)
    x = torch.randn(count, IN)
    expected = joint(x)
    for token, slot in enumerate(slots.tolist()):
        for change, width, at in zip(own[slot - 1], WIDTHS, columns, strict=True):
            if slot:
                expected[token, at] += lone_bias(change, width)
    assert torch.equal(joint(x, Biases(slots, table, 0, columns)), expected)
    single = kind.of(torch.randn(50, IN), None)
    expected = single(x)
    for token, slot in enumerate(slots.tolist()):
        if slot:
            expected[token] += lone_bias(own[slot - 1][2], 50)
    assert torch.equal(single(x, Biases(slots, table, 2, [slice(0, 50)])), expected)


def test_a_norm_adds_them() -> None:
    torch.manual_seed(0)
    own = changes()
    table, slots = table_of(own), torch.arange(20) % (len(KINDS) + 1)
    norm, x = RmsNorm(torch.rand(64), 1e-6), torch.randn(20, 64)
    expected = norm(x)
    for token, slot in enumerate(slots.tolist()):
        if slot:
            expected[token] += lone_bias(own[slot - 1][0], 64)
    found = Biases(slots, table, 0, [slice(0, 64)])
    assert torch.equal(norm(x, found), expected)
    total, normed = norm.of_sum(x / 2, x / 2, found)
    assert torch.equal(total, x)
    assert torch.equal(normed, expected)


def test_what_has_come_is_not_added_again() -> None:
    torch.manual_seed(0)
    own = changes()
    table, tokens = table_of(own), torch.arange(10)
    slots = (tokens % len(KINDS) + 1).sort().values
    x, y = torch.randn(10, IN), torch.randn(10, sum(WIDTHS))
    whole, parts = y.clone(), y.clone()
    grouped_affine(x, whole, tokens, slots, table, 0, WIDTHS, None)
    grouped_affine(x, parts, tokens, slots, table, 0, WIDTHS, None, add_bias_only=False)
    for token, slot in enumerate(slots.tolist()):
        added = torch.cat([lone_bias(c, w) for c, w in zip(own[slot - 1], WIDTHS, strict=True)])
        torch.testing.assert_close(parts[token] + added, whole[token])
    assert torch.equal(parts[slots == 1], y[slots == 1])
