"""The int8 linears against their twins, how far they are from float32, and that no row sees another."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from server.kernels.cpu.int8.linear import Int8Linear, int8_linear_reference, pack, unpack
from server.kernels.cpu.int8.quantization import is_dequantised, max_quantized_input, quantize
from server.kernels.cpu.int8.vnni_linear import VnniLinear, pack_bytes, unpack_bytes, vnni_linear_reference
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.packed_linear import without_rounding

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")

SHAPES = [(1, 8), (65, 41), (192, 576), (200, 301)]  # outputs, inputs: also such as fill no panel, no pair
ROWS = [1, 2, 3, 5, 8, 11, 16, 17, 31, 63, 64, 130, 300]


@dataclass
class Kind:
    linear: type[Int8Linear]
    twin: Callable[..., torch.Tensor]
    pack: Callable[[torch.Tensor], torch.Tensor]
    unpack: Callable[[torch.Tensor, int, int], torch.Tensor]
    error: float  # of inputs beside an outlier, of the largest output


KINDS = {
    "16-bit": Kind(Int8Linear, int8_linear_reference, pack, unpack, 1e-3),
    "8-bit": Kind(VnniLinear, vnni_linear_reference, pack_bytes, unpack_bytes, 5e-2),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def make(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(outputs)
    return torch.randn(outputs, inputs, generator=rng), torch.randn(outputs, generator=rng)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_held_is_the_nearest_of_255_values(kind: Kind, shape: tuple[int, int]) -> None:
    weight, _ = make(*shape)
    quantized, scales = quantize(weight)
    assert torch.equal(kind.unpack(kind.pack(quantized), *shape), quantized)
    held = kind.linear.of(weight, None).weight()
    assert torch.equal(held, quantized * scales[:, None])
    assert ((held - weight).abs() <= scales[:, None] * 0.5001).all()
    assert torch.equal(quantize(held)[0], quantized), "quantized again it stays as it is"


def test_a_copy_of_the_base_is_known_and_another_table_is_not(kind: Kind) -> None:
    weight, _ = make(65, 41)
    held = kind.linear.of(weight, None).weight()
    assert is_dequantised(held, weight)
    assert is_dequantised(held, weight.bfloat16())
    assert not is_dequantised(held, weight * 1.1)
    weight[3, 5] += 0.5
    assert not is_dequantised(held, weight)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_its_twin(kind: Kind, shape: tuple[int, int], with_bias: bool) -> None:
    weight, bias = make(*shape)
    added = bias if with_bias else None
    linear = kind.linear.of(weight, added)
    for rows in ROWS:
        x = torch.randn(rows, shape[1])
        expected = kind.twin(x, *quantize(weight), added)
        torch.testing.assert_close(linear(x), expected, atol=2e-3, rtol=1e-4)


def test_inputs_stay_good_beside_outliers(kind: Kind) -> None:
    weight, _ = make(192, 576)
    linear = kind.linear.of(weight, None)
    x = torch.randn(16, 576)
    x[:, 7] = 300.0
    exact = x.double() @ linear.weight().double().T
    error = (linear(x) - exact).abs().max() / exact.abs().max()
    assert error < kind.error


def test_sums_of_the_largest_values_fit(kind: Kind) -> None:
    for inputs in (8, 576, 1536, 14336):
        assert max_quantized_input(inputs) * 127 * inputs < 2**31
        linear = kind.linear.of(torch.ones(64, inputs), None)
        torch.testing.assert_close(linear(torch.ones(2, inputs)), torch.full((2, 64), float(inputs)))
        torch.testing.assert_close(linear(-torch.ones(2, inputs)), torch.full((2, 64), -float(inputs)))


def test_a_row_is_the_same_bit_for_bit_in_any_batch(kind: Kind) -> None:
    weight, bias = make(200, 301)
    linear = kind.linear.of(weight, bias)
    x = torch.randn(300, 301) * torch.logspace(-6, 6, 300)[:, None]
    alone = torch.cat([linear(x[i : i + 1]) for i in range(300)])
    for rows in ROWS:
        assert torch.equal(linear(x[:rows]), alone[:rows]), rows


def test_zeros_give_the_bias(kind: Kind) -> None:
    weight, bias = make(65, 41)
    assert torch.equal(kind.linear.of(weight, bias)(torch.zeros(3, 41)), bias.expand(3, -1))
    assert not kind.linear.of(torch.zeros(65, 41), None)(torch.randn(3, 41)).any()


def test_a_row_that_is_not_finite_stays_so_and_alone(kind: Kind) -> None:
    weight, _ = make(65, 41)
    linear = kind.linear.of(weight, None)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(20, 41)
        whole = linear(x)
        x[3, 5] = bad
        y = linear(x)
        assert not y[3].isfinite().all()
        others = [i for i in range(20) if i != 3]
        assert torch.equal(y[others], whole[others])


def test_joined_they_give_what_each_gave(kind: Kind) -> None:
    linears = [kind.linear.of(*make(outputs, 41)) for outputs in (65, 64, 3)]
    x = torch.randn(9, 41)
    before = [linear(x) for linear in linears]
    whole, columns = kind.linear.join(linears)
    y = whole(x)
    for linear, span, expected in zip(linears, columns, before, strict=True):
        assert torch.equal(y[:, span], expected)
        assert torch.equal(linear(x), expected)


def test_unrounded_inputs_are_as_good_as_float32(kind: Kind) -> None:
    weight, bias = make(200, 301)
    linear, x = kind.linear.of(weight, bias), torch.randn(5, 301)
    with without_rounding():
        exact = linear(x)
    torch.testing.assert_close(exact, x @ linear.weight().T + bias)
    assert not torch.equal(linear(x), exact)


def test_the_base_can_do_without_numba() -> None:
    """As on a Mac, where the plain layout serves."""
    alone = "import sys; sys.modules.update(numba=None, llvmlite=None)"
    loaded = "import server.engine.model.linear_sites, server.kernels.weight_formats as formats"
    check = "assert not any(kind.available for kind in formats.WEIGHT_FORMATS.values())"
    subprocess.run([sys.executable, "-c", f"{alone}; {loaded}; {check}"], check=True)
