import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.adapters.checksum import checksum


@given(size=st.integers(1, 3000), data=st.data())
def test_any_changed_byte_breaks_it(size: int, data: st.DataObject) -> None:
    flat = torch.randint(0, 256, (size,), dtype=torch.uint8)
    expected = checksum(flat)
    place, mask = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))
    flat[place] ^= mask
    assert checksum(flat) != expected
    flat[place] ^= mask
    assert checksum(flat) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_swapped_words_break_it(dtype: torch.dtype) -> None:
    flat = torch.randn(4096).to(dtype)
    assert checksum(flat) != checksum(torch.cat([flat[8:16], flat[:8], flat[16:]]))


def test_it_may_be_taken_of_weights_in_training() -> None:
    assert checksum(torch.zeros(5, requires_grad=True)) == checksum(torch.zeros(5))
