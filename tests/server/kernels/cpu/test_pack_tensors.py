import pytest
import torch

from server.kernels.cpu.openmp import AVAILABLE
from server.kernels.cpu.pack_tensors import copies_of

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="this kernel is compiled by numba")


def parts_of(memory: torch.Tensor) -> list[torch.Tensor]:
    """Views of 4,000 numbers: plain, transposed, of one dimension, wider than a tile, apart."""
    return [
        memory[:600].view(4, 150),
        memory[600:1800].view(300, 4).T,
        memory[1800:1807],
        memory[1807:3007].view(1, 1200),
        memory[3007:3407].view(20, 20)[::2, ::3],
        memory[3500:3500],
    ]


def test_parts_lie_back_to_back_each_times_its_factor() -> None:
    parts, factors = parts_of(torch.randn(4000)), [1.0, 0.3, -2.0, 1.0, 0.1, 1.0]
    copies = copies_of(parts, factors)
    assert copies
    expected = torch.cat([(part * factor).reshape(-1) for part, factor in zip(parts, factors, strict=True)])
    found = copies.run(0)
    assert found is not None
    assert torch.equal(found, expected)


def test_the_same_copies_serve_other_memory() -> None:
    first, second = torch.randn(4000), torch.randn(4000)
    copies = copies_of(parts_of(first), [1.0] * 6)
    again = copies.within(first) if copies else None
    assert again
    found = again.run(second.data_ptr())
    assert found is not None
    assert torch.equal(found, torch.cat([part.reshape(-1) for part in parts_of(second)]))


def test_what_lies_elsewhere_is_not_within() -> None:
    memory = torch.randn(4000)
    whole = copies_of([*parts_of(memory), torch.randn(3)], [1.0] * 7)
    assert whole
    assert whole.within(memory) is None
    past = copies_of(parts_of(memory), [1.0] * 6)
    assert past
    assert past.within(memory[:3000]) is None
    assert past.within(memory[1:]) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("at", [0, 599, 601, 1806, 3006])
def test_what_is_not_finite_is_told(value: float, at: int) -> None:
    memory = torch.randn(4000)
    memory[at] = value
    copies = copies_of(parts_of(memory), [2.0] * 6)  # twice 3e38 is none
    assert copies
    assert copies.run(0) is None


def test_other_tensors_are_left_to_torch() -> None:
    assert copies_of([torch.zeros(3, dtype=torch.float16)], [1.0]) is None
    assert copies_of([torch.zeros(3)], [1.0], torch.float16) is None
    assert copies_of([torch.zeros(2, 2, 2)], [1.0]) is None
    assert copies_of([torch.zeros(())], [1.0]) is None
    assert copies_of([], []) is None


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16])
def test_narrow_numbers_are_torchs_own(source: torch.dtype, target: torch.dtype) -> None:
    memory = (torch.randn(4000) * torch.logspace(-44, 30, 4000)).to(source)
    parts, factors = parts_of(memory), [1.0, 0.3, -2.0, 1.0, 0.1, 1.0]
    copies = copies_of(parts, factors, target)
    again = copies.within(memory) if copies else None
    assert again
    products = [(part.float() * factor).reshape(-1) for part, factor in zip(parts, factors, strict=True)]
    found = again.run(memory.data_ptr())
    assert found is not None
    assert torch.equal(found, torch.cat(products).to(target))


def test_what_bfloat16_cannot_hold_is_told() -> None:
    large = torch.full((3,), 3.4e38)
    copies = copies_of([large], [1.0], torch.bfloat16)
    assert copies
    assert copies.run(0) is None
