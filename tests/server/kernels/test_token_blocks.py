"""Tokens in blocks, pieces at addresses that kernels like; none of it needs Triton."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.kernels.token_blocks import aligned, put_in_blocks, round_up
from server.kernels.transfers import upload

CPU = torch.device("cpu")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 40)), max_size=12), st.sampled_from([1, 4, 16]))
def test_every_token_is_in_one_block_of_its_slot(rows: list[tuple[int, int]], size: int) -> None:
    spans, at = [], 0
    for slot, count in rows:
        spans.append((slot, at, at + count))
        at += count
    order, blocks = put_in_blocks(spans, size)
    found: dict[int, int] = {}
    for i in range(0, len(blocks), 3):
        slot, first, count = blocks[i : i + 3]
        assert 0 < count <= size
        for token in order[first : first + count]:
            assert token not in found
            found[token] = slot
    assert found == {t: slot for slot, start, end in spans for t in range(start, end)}
    full = sum(-(-sum(n for s, n in rows if s == slot) // size) for slot in range(1, 5))
    assert len(blocks) == 3 * full, "spans of one slot share blocks"


def test_pieces_begin_at_multiples_of_16_bytes() -> None:
    for dtype, odd in ((torch.float32, 3), (torch.bfloat16, 4)):
        flat = torch.arange(64).to(dtype)
        sizes = [16, odd, 8, 64 - 24 - odd]
        pieces = aligned(flat, sizes)
        assert all(piece.data_ptr() % 16 == 0 for piece in pieces)
        assert torch.equal(torch.cat(pieces), flat)
    even = aligned(flat, [32, 32])
    assert even[1].data_ptr() == flat[32:].data_ptr(), "what lies well is not copied"


def test_ranks_are_rounded_up() -> None:
    assert [round_up(rank) for rank in (0, 1, 16, 17, 64, 65)] == [16, 16, 16, 32, 64, 128]


def test_one_upload_many_parts() -> None:
    parts = upload([[1, 2], [], [3]], CPU)
    assert [part.tolist() for part in parts] == [[1, 2], [], [3]]
    assert parts[0].dtype == torch.int64
