"""The rotary embedding in one launch against its plain twin and inside models."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fixtures.gpu import DEVICE, TOLERANCE, needs_triton
from tests.fixtures.models import load_model

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 24])
def test_equals_its_twin(dtype: torch.dtype, dim: int) -> None:
    from server.kernels.gpu.rotary import rotate, rotate_reference

    torch.manual_seed(0)
    q = torch.randn(1, 5, 4, dim).to(DEVICE, dtype).transpose(1, 2)  # as a projection gives it
    k = torch.randn(1, 5, 2, dim + 8).to(DEVICE, dtype)[..., :dim].transpose(1, 2)
    angle = torch.rand(1, 5, dim) * 6
    cos, sin = angle.cos().to(DEVICE, dtype), angle.sin().to(DEVICE, dtype)
    twins = rotate_reference(q.float(), k.float(), cos.float(), sin.float())
    for ours, twin in zip(rotate(q, k, cos, sin), twins, strict=True):
        assert ours.shape == twin.shape
        torch.testing.assert_close(ours.float(), twin, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        assert ours[0].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize(("family", "layers"), [("llama", 2), ("qwen3", 2), ("gemma2", 2), ("gpt2", 0)])
def test_tells_a_models_attention(tiny_models: Callable[[str], Path], family: str, layers: int) -> None:
    from server.engine.cuda.fused_modules import fuse_rotary

    model, other = (load_model(tiny_models(family)).to(DEVICE) for _ in range(2))
    ids = torch.arange(12, device=DEVICE)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert fuse_rotary(model) == layers
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-4)
        assert torch.equal(other(ids).logits, expected), "another model of the class is as it was"
        two = ids.repeat(2, 1)  # not as the engine packs tokens: theirs does it
        torch.testing.assert_close(model(two).logits, other(two).logits, atol=1e-3, rtol=1e-4)


def test_what_rotates_otherwise_is_left_alone() -> None:
    from server.engine.cuda.fused_modules import rotates_halves

    def pairs(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As GLM has it: neighbours rotate against each other."""
        return tuple(  # type: ignore[return-value]
            x * cos[:, None] + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin[:, None]
            for x in (q, k)
        )

    def of_one(q: torch.Tensor, cos: torch.Tensor) -> torch.Tensor:
        return q * cos

    assert not rotates_halves(pairs)
    assert not rotates_halves(of_one)  # type: ignore[arg-type]
