import pytest
import torch

from server.kernels.cpu.decode_attention import decode_attention
from server.kernels.cpu.paged_attention import (
    BLOCK,
    AttentionOptions,
    decode_attention_reference,
    gather_pages,
    prefill_attention,
    write_pages,
)

LENGTHS = [1, 15, 16, 17, 40, 129]


def paged(
    lengths: list[int], kv_heads: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Pages holding random rows in shuffled blocks; every other place is NaN, as a freed page may be."""
    need = [-(-n // BLOCK) for n in lengths]
    order = torch.randperm(sum(need) + 3).tolist()
    keys = torch.full((len(order), kv_heads, dim, BLOCK), float("nan"))
    values = torch.full((len(order), kv_heads, BLOCK, dim), float("nan"))
    tables = torch.zeros(len(lengths), max(need), dtype=torch.int64)
    dense = []
    for i, n in enumerate(lengths):
        blocks = torch.tensor([order.pop() for _ in range(need[i])])
        tables[i, : need[i]] = blocks
        at = torch.arange(n)
        k, v = torch.randn(n, kv_heads, dim), torch.randn(n, kv_heads, dim)
        write_pages(keys, values, k, v, blocks[at // BLOCK] * BLOCK + at % BLOCK)
        dense.append((k, v))
    return keys, values, tables, dense


@pytest.mark.parametrize("dim", [8, 24, 64, 72, 128])
@pytest.mark.parametrize("heads", [(4, 2), (9, 3), (4, 4), (8, 2), (14, 2)])
@pytest.mark.parametrize(
    "scores",
    [
        AttentionOptions(0.125),
        AttentionOptions(0.3, window=10),
        AttentionOptions(0.3, 20, 5.0),
        AttentionOptions(1.0, 0, 2.0),
    ],
)
def test_decode_matches_its_twin(heads: tuple[int, int], scores: AttentionOptions, dim: int) -> None:
    torch.manual_seed(0)
    keys, values, tables, _ = paged(LENGTHS, heads[1], dim)
    q = torch.randn(len(LENGTHS), heads[0], dim)
    k, v = torch.randn(2, len(LENGTHS), heads[1], dim)
    lengths = torch.tensor(LENGTHS)
    pages = (keys.clone(), values.clone())
    ours = decode_attention(q, k, v, keys, values, tables, lengths, scores)
    twin = decode_attention_reference(q, k, v, *pages, tables, lengths, scores)
    torch.testing.assert_close(ours, twin, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close((keys, values), pages, equal_nan=True, atol=0, rtol=0)


def test_a_row_gets_the_same_bits_alone_and_among_others() -> None:
    torch.manual_seed(0)
    keys, values, tables, _ = paged(LENGTHS, 3, 64)
    q, lengths = torch.randn(len(LENGTHS), 9, 64), torch.tensor(LENGTHS)
    k, v = torch.randn(2, len(LENGTHS), 3, 64)
    together = decode_attention(q, k, v, keys, values, tables, lengths, AttentionOptions(0.125))
    for i in range(len(LENGTHS)):
        own = slice(i, i + 1)
        alone = decode_attention(
            q[own], k[own], v[own], keys, values, tables[own], lengths[own], AttentionOptions(0.125)
        )
        assert torch.equal(alone, together[own])


def test_gather_returns_what_was_written() -> None:
    keys, values, tables, dense = paged(LENGTHS, 2, 8)
    for i, n in enumerate(LENGTHS):
        k, v = gather_pages(keys, values, tables[i, : -(-n // BLOCK)], n)
        assert torch.equal(k.transpose(0, 1), dense[i][0])
        assert torch.equal(v.transpose(0, 1), dense[i][1])


@pytest.mark.parametrize(
    "scores",
    [
        AttentionOptions(0.2),
        AttentionOptions(0.2, window=7),
        AttentionOptions(0.2, 7, 3.0),
        AttentionOptions(0.2, 0, 3.0),
    ],
)
@pytest.mark.parametrize(("n", "length"), [(33, 33), (5, 33), (1, 33)])
def test_a_chunk_equals_token_by_token(scores: AttentionOptions, n: int, length: int) -> None:
    torch.manual_seed(1)
    keys, values, tables, dense = paged([length], 2, 16)
    q = torch.randn(n, 4, 16)
    k, v = (t.transpose(0, 1) for t in dense[0])
    chunk = prefill_attention(q, k, v, scores)
    for i in range(n):
        seen = torch.tensor([length - n + i + 1])
        at = length - n + i
        new_k, new_v = dense[0][0][at : at + 1], dense[0][1][at : at + 1]
        alone = decode_attention_reference(q[i : i + 1], new_k, new_v, keys, values, tables, seen, scores)
        torch.testing.assert_close(chunk[i : i + 1], alone, atol=2e-6, rtol=1e-5)
