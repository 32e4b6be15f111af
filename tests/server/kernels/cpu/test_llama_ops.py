"""Norm, rotary embedding and SiLU against their twins; tokens that do not see each other."""

import pytest
import torch

from server.engine.cpu.decoder_layers import by_head
from server.kernels.cpu.llama_ops import (
    RmsNorm,
    rms_norm_reference,
    rotate_,
    rotate_reference,
    silu_times,
    silu_times_reference,
)
from server.kernels.cpu.openmp import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")

TOKENS = [1, 2, 16, 150]


@pytest.mark.parametrize("width", [24, 576])
def test_norm_equals_its_twin(width: int) -> None:
    weight = torch.randn(width)
    norm = RmsNorm(weight, 1e-5)
    for count in TOKENS:
        x, added = torch.randn(2, count, width) * 3
        torch.testing.assert_close(norm(x), rms_norm_reference(x, weight, 1e-5), atol=2e-6, rtol=1e-5)
        total, y = norm.of_sum(x, added)
        assert torch.equal(total, x + added)
        torch.testing.assert_close(y, norm(total), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dim", [8, 64])
def test_rotation_equals_its_twin(dim: int) -> None:
    norm = RmsNorm(torch.randn(dim), 1e-6)
    for count in TOKENS:
        angles = torch.randn(count, dim // 2).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        whole = torch.randn(count, 9 * dim)
        expected, rest = whole[:, dim : 4 * dim].view(count, 3, dim), whole.clone()
        turned = rotate_reference(expected, cos, sin)
        normed = rotate_reference(rms_norm_reference(expected, norm.weight, 1e-6), cos, sin)
        both = whole.clone()
        rotate_(by_head(whole[:, dim : 4 * dim], dim), cos, sin)
        torch.testing.assert_close(whole[:, dim : 4 * dim].view(count, 3, dim), turned, atol=2e-6, rtol=1e-5)
        assert torch.equal(whole[:, :dim], rest[:, :dim])
        assert torch.equal(whole[:, 4 * dim :], rest[:, 4 * dim :])
        rotate_(by_head(both[:, dim : 4 * dim], dim), cos, sin, norm)
        torch.testing.assert_close(both[:, dim : 4 * dim].view(count, 3, dim), normed, atol=4e-6, rtol=1e-5)


def test_silu_equals_its_twin_at_any_size() -> None:
    for count in TOKENS:
        whole = torch.randn(count, 400) * torch.logspace(-3, 3, 400)
        gate, up = whole[:, :200], whole[:, 200:]
        torch.testing.assert_close(silu_times(gate, up), silu_times_reference(gate, up), atol=1e-5, rtol=2e-6)
    far = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]])
    torch.testing.assert_close(silu_times(far, torch.ones(1, 5)), silu_times_reference(far, torch.ones(1, 5)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_alone(bad: float) -> None:
    x = torch.randn(20, 64)
    norm = RmsNorm(torch.ones(64), 1e-5)
    before, gated = norm(x), silu_times(x, x)
    x[3, 5] = bad
    for after, was in ((norm(x), before), (silu_times(x, x), gated)):
        others = [i for i in range(20) if i != 3]
        assert torch.equal(after[others], was[others])
        assert bad == -float("inf") or not after[3].isfinite().all()


def test_a_token_is_the_same_bit_for_bit_in_any_batch() -> None:
    x = torch.randn(150, 576)
    norm = RmsNorm(torch.randn(576), 1e-5)
    assert torch.equal(norm(x), torch.cat([norm(x[i : i + 1]) for i in range(150)]))
    sums = torch.cat([norm.of_sum(x[i : i + 1], x[i : i + 1])[1] for i in range(150)])
    assert torch.equal(norm.of_sum(x, x)[1], sums)
    alone = torch.cat([silu_times(x[i : i + 1, :288], x[i : i + 1, 288:]) for i in range(150)])
    assert torch.equal(silu_times(x[:, :288], x[:, 288:]), alone)
