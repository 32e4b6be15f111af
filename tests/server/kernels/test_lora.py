import pytest
import torch

from server.kernels.lora import COLUMNS, grouped_lora, grouped_lora_reference
from server.kernels.openmp import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="the fast path needs Linux, numba and OpenMP")

IN, OUT = 37, 53  # no multiple of anything


def adapter(rank: int, dora: bool, biased: bool) -> dict[str, torch.Tensor | None]:
    return {
        "a": torch.randn(rank, IN),
        "b": torch.randn(rank, OUT),
        "gain": torch.randn(OUT) if dora else None,
        "added": torch.randn(OUT) if biased else None,
    }


def address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


@pytest.mark.parametrize("base_bias", [False, True])
def test_every_token_gets_its_own_adapter(base_bias: bool) -> None:
    torch.manual_seed(0)
    kinds = [(1, False, False), (3, True, False), (8, False, True), (16, True, True), (61, False, False)]
    adapters = [adapter(*kind) for kind in kinds]
    table = torch.zeros(len(adapters) + 2, COLUMNS, dtype=torch.int64)
    for slot, own in enumerate(adapters, start=1):
        assert own["a"] is not None
        row = [
            own["a"].data_ptr(),
            address(own["b"]),
            own["a"].shape[0],
            address(own["gain"]),
            address(own["added"]),
        ]
        table[slot] = torch.tensor(row)
    bias = torch.randn(OUT) if base_bias else None
    x, y = torch.randn(20, IN), torch.randn(20, OUT)
    tokens = torch.tensor([0, 19, 4, 5, 6, 11, 12])
    slots = torch.tensor([1, 2, 3, 3, 4, 5, 6])  # slot 6 holds nothing
    expected = y.clone()
    for token, slot in zip(tokens.tolist(), slots.tolist(), strict=True):
        if slot <= len(adapters):
            grouped_lora_reference(x, expected, token, **adapters[slot - 1], base_bias=bias)  # type: ignore[arg-type]
    grouped_lora(x, y, tokens, slots, table, bias)
    torch.testing.assert_close(y, expected, atol=2e-4, rtol=1e-5)
    untouched = [t for t in range(20) if t not in tokens.tolist()] + [12]
    assert torch.equal(y[untouched], expected[untouched])
