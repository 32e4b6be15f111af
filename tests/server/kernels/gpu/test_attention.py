"""Attention over pages against its plain twins, on a GPU or under Triton's interpreter."""

import pytest
import torch

from server.kernels.cpu.paged_attention import (
    BLOCK,
    AttentionOptions,
    decode_attention_reference,
    prefill_attention,
    write_pages,
)
from tests.fixtures.gpu import DEVICE, TOLERANCE, needs_triton
from tests.server.kernels.cpu.test_paged_attention import LENGTHS, paged

pytestmark = [
    needs_triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # numpy's, whose 1 / inf is 0, too
]

SCORES = [
    AttentionOptions(0.125),
    AttentionOptions(0.3, window=10),
    AttentionOptions(0.3, 20, 5.0),
    AttentionOptions(1.0, 0, 2.0),
]


@pytest.mark.parametrize(
    ("heads", "dim", "scores", "dtype"),
    [
        *(((4, 2), 24, scores, torch.float32) for scores in SCORES),
        ((9, 3), 16, SCORES[2], torch.bfloat16),
        ((4, 4), 40, SCORES[0], torch.float16),
        ((9, 3), 16, SCORES[0], torch.float32),
    ],
)
def test_decode_matches_its_twin(
    heads: tuple[int, int], dim: int, scores: AttentionOptions, dtype: torch.dtype
) -> None:
    from server.kernels.gpu import decode_attention as ours

    torch.manual_seed(0)
    keys, values, tables, _ = paged(LENGTHS, heads[1], dim)
    rows = len(LENGTHS)
    keys, values, tables = keys.to(DEVICE, dtype), values.to(DEVICE, dtype), tables.to(DEVICE)
    q = torch.randn(heads[0], rows, dim).to(DEVICE, dtype).transpose(0, 1)  # as transformers has it
    k, v = torch.randn(2, rows, heads[1], dim).to(DEVICE, dtype)
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    twins = (keys.float(), values.float())
    expected = decode_attention_reference(q.float(), k.float(), v.float(), *twins, tables, lengths, scores)
    last = lengths - 1
    places = tables.gather(1, (last // BLOCK)[:, None])[:, 0] * BLOCK + last % BLOCK
    ours.write_pages(keys, values, k, v, places)
    torch.testing.assert_close((keys.float(), values.float()), twins, equal_nan=True, atol=0, rtol=0)
    out = torch.full((rows + 2, heads[0], dim), float("nan")).to(DEVICE, dtype)
    padded = torch.cat([lengths, lengths.new_zeros(1)])  # a row that is not there, as a recorded step has
    tables = torch.cat([tables, tables.new_zeros(1, tables.shape[1])])
    q = torch.cat([q, q[:1]])
    ours.decode_attention(q, keys, values, tables, padded, scores, out[:-1])
    torch.testing.assert_close(out[:rows].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert not out[rows].any(), "a row without tokens gives zeros"
    assert out[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scores", [SCORES[0], SCORES[2]])
def test_chunks_of_many_rows_match_their_twin(scores: AttentionOptions, dtype: torch.dtype) -> None:
    from server.kernels.gpu.prefill_attention import chunk_attention, cut_chunks

    torch.manual_seed(1)
    dim, heads, kv_heads = 24, 4, 2
    lengths, counts = [33, 100, 17], [33, 70, 5]  # a whole prompt, the end of a long one, a short end
    keys, values, tables, dense = paged(lengths, kv_heads, dim)
    keys, values = keys.to(DEVICE, dtype), values.to(DEVICE, dtype)
    q = torch.randn(heads, sum(counts) + 1, dim).to(DEVICE, dtype).transpose(0, 1)
    spans, first = [], 1  # a row that decodes comes first, and is not its business
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        spans.append((i, first, count, length - count))
        first += count
    chunks = torch.tensor(cut_chunks(spans), device=DEVICE).view(-1, 4)
    out = torch.full((sum(counts) + 1, heads, dim), float("nan")).to(DEVICE, dtype)
    chunk_attention(q, keys, values, tables.to(DEVICE), chunks, scores, out)
    for (_, first, count, _), (k, v) in zip(spans, dense, strict=True):
        past_k, past_v = (t.to(DEVICE, dtype).float().transpose(0, 1) for t in (k, v))
        expected = prefill_attention(q[first : first + count].float(), past_k, past_v, scores)
        own = out[first : first + count].float()
        torch.testing.assert_close(own, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert out[0].isnan().all()


def test_a_token_without_a_place_is_written_nowhere() -> None:
    from server.kernels.gpu import decode_attention as ours

    keys = torch.zeros(3, 2, 24, BLOCK, device=DEVICE)
    values = torch.zeros(3, 2, BLOCK, 24, device=DEVICE)
    k, v = torch.randn(2, 3, 2, 24, device=DEVICE)
    places = torch.tensor([20, -1, 47], device=DEVICE)
    twins = (keys.clone(), values.clone())
    write_pages(*twins, k[[0, 2]], v[[0, 2]], places[[0, 2]])
    ours.write_pages(keys, values, k, v, places)
    assert torch.equal(keys, twins[0])
    assert torch.equal(values, twins[1])
