"""The table of weight formats: what it says of a format is what the format's linear does."""

from typing import get_args

import pytest
import torch

from server.kernels.cpu.int8.linear import Int8Linear
from server.kernels.cpu.int8.vnni_linear import VnniLinear
from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.packed_linear import PackedLinear
from server.kernels.weight_formats import FLOAT32, INT8, UNQUANTIZED, WEIGHT_FORMATS, weight_format_of
from server.settings import Settings

SHAPES = [(1, 8), (65, 41), (192, 576)]  # outputs, inputs
needs_kernels = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")


def test_the_settings_name_every_quantisation() -> None:
    names = get_args(Settings.model_fields["quantize"].annotation)
    assert names == (UNQUANTIZED, *(name for name, kind in WEIGHT_FORMATS.items() if kind.rounds))
    assert [weight_format_of(name).rounds for name in names] == [False, *[True] * (len(names) - 1)]


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("linear", [FLOAT32.linear, Int8Linear, VnniLinear])
def test_a_packed_weight_takes_the_bytes_that_are_said(
    linear: type[PackedLinear], shape: tuple[int, int]
) -> None:
    packed = linear.of(torch.randn(shape), None)
    assert linear.packed_bytes(*shape) == sum(part.nbytes for part in packed.parts)


@needs_kernels
@pytest.mark.parametrize("kind", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
def test_what_is_not_float32_on_a_cpu_stays_plain(kind: object) -> None:
    assert isinstance(kind, type(FLOAT32))
    assert kind.pack(torch.randn(3, 8, dtype=torch.bfloat16), None) is None
    assert kind.pack(torch.empty(3, 8, device="meta"), None) is None
    assert kind.pack(torch.randn(3, 8), None) is not None


@needs_kernels
def test_only_a_quantisation_takes_rounded_weights_for_a_copy() -> None:
    weight = torch.randn(65, 41)
    packed = INT8.pack(weight, None)
    assert packed is not None
    assert INT8.is_copy(packed.weight(), weight)
    assert not FLOAT32.is_copy(packed.weight(), weight)
    for kind in (FLOAT32, INT8):
        assert kind.is_copy(weight, weight.bfloat16())
        assert kind.is_copy(weight.bfloat16(), weight)
        assert not kind.is_copy(weight, weight + 1)
