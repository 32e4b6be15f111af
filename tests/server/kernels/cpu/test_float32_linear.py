"""The packed linear against its twin, and that a row's result depends on nobody else's."""

import pytest
import torch

from server.kernels.cpu.float32_linear import Float32Linear, linear_reference, pack, unpack
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.packed_linear import LANES

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")

SHAPES = [(1, 8), (65, 40), (192, 576), (200, 300)]  # outputs, inputs: also such as fill no panel, no group
ROWS = [1, 2, 3, 5, 8, 11, 16, 17, 31, 63, 64, 130, 300]


def make(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(outputs)
    return torch.randn(outputs, inputs, generator=rng), torch.randn(outputs, generator=rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_packing_loses_nothing(shape: tuple[int, int]) -> None:
    weight, _ = make(*shape)
    panels = pack(weight)
    assert panels.shape[1:] == (shape[1], LANES)
    assert torch.equal(unpack(panels, shape[0]), weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_its_twin(shape: tuple[int, int], with_bias: bool) -> None:
    weight, bias = make(*shape)
    panels, added = pack(weight), bias if with_bias else None
    linear = Float32Linear.of(weight, added)
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        torch.testing.assert_close(linear(x), linear_reference(x, panels, shape[0], added), atol=2e-4, rtol=0)


def test_a_row_is_the_same_bit_for_bit_in_any_batch() -> None:
    weight, bias = make(200, 300)
    linear = Float32Linear.of(weight, bias)
    x = torch.randn(300, 300)
    alone = torch.cat([linear(x[i : i + 1]) for i in range(300)])
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), alone[:rows]), rows


def test_rows_may_lie_apart() -> None:
    weight, _ = make(65, 40)
    linear = Float32Linear.of(weight, None)
    wide = torch.randn(9, 100)
    assert torch.equal(linear(wide[:, 10:50]), linear(wide[:, 10:50].contiguous()))
    assert torch.equal(linear(wide[:, 0:80:2]), linear(wide[:, 0:80:2].contiguous()))
