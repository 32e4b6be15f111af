"""What would make a native kernel address memory beyond its tensors is refused before it is launched."""

from collections.abc import Callable

import pytest
import torch

from server.adapters.methods.token_spans import Span, TokenSpans
from server.kernels.cpu.decode_attention import decode_attention
from server.kernels.cpu.float32_linear import Float32Linear
from server.kernels.cpu.grouped_affine import COLUMNS, grouped_affine
from server.kernels.cpu.grouped_bottleneck import grouped_bottleneck
from server.kernels.cpu.llama_ops import RmsNorm, add_, rotate_, silu_times
from server.kernels.cpu.openmp import AVAILABLE, ShapeError
from server.kernels.cpu.paged_attention import BLOCK, AttentionOptions, write_pages

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the kernels need numba and torch's own libgomp")

KEYS, VALUES = torch.zeros(4, 2, 16, BLOCK), torch.zeros(4, 2, BLOCK, 16)
PLACES = torch.arange(3)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


def decode(heads: int, kv_heads: int, dim: int, tables: int = 3) -> None:
    q, k = zeros(3, heads, dim), zeros(3, kv_heads, dim)
    table, lengths = torch.zeros(tables, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    decode_attention(q, k, k, KEYS, VALUES, table, lengths, AttentionOptions(1.0))


def affine(tokens: int, outputs: int) -> None:
    slots, table = torch.zeros(3, dtype=torch.int64), torch.zeros(1, 1, COLUMNS, dtype=torch.int64)
    grouped_affine(zeros(3, 8), zeros(tokens, outputs), PLACES, slots, table, 0, [16], None)


def bottleneck() -> None:
    table = torch.zeros(1, 8, dtype=torch.int64)
    grouped_bottleneck(zeros(3, 8), zeros(2, 8), PLACES, torch.zeros(3, dtype=torch.int64), table)


@pytest.mark.parametrize(
    "launch",
    [
        lambda: write_pages(KEYS, VALUES, zeros(3, 1, 16), zeros(3, 1, 16), PLACES),
        lambda: write_pages(KEYS, VALUES, zeros(3, 2, 8), zeros(3, 2, 8), PLACES),
        lambda: write_pages(KEYS, VALUES, zeros(2, 2, 16), zeros(2, 2, 16), PLACES),
        lambda: decode(4, 1, 16),
        lambda: decode(3, 2, 16),
        lambda: decode(4, 2, 8),
        lambda: decode(4, 2, 16, tables=2),
        lambda: Float32Linear.of(zeros(16, 8), None)(zeros(3, 4)),
        lambda: RmsNorm(zeros(16), 1e-6)(zeros(3, 8)),
        lambda: rotate_(zeros(3, 2, 16), zeros(3, 8), zeros(3, 8)),
        lambda: rotate_(zeros(3, 2, 16), zeros(2, 16), zeros(2, 16)),
        lambda: silu_times(zeros(3, 16), zeros(3, 8)),
        lambda: add_(zeros(3, 16), zeros(2, 16)),
        lambda: affine(2, 16),
        lambda: affine(3, 8),
        bottleneck,
    ],
)
def test_other_shapes_are_refused(launch: Callable[[], object]) -> None:
    with pytest.raises(ShapeError):
        launch()


def test_a_module_that_sees_other_tokens_than_the_step_is_refused() -> None:
    rows = TokenSpans([Span(1, 0, 1)], count=8)
    rows.check_count(8)
    with pytest.raises(RuntimeError, match="saw 3 tokens in a step of 8"):
        rows.check_count(3)
