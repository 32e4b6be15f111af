"""RMSNorm in one launch against its plain twin and against the models' own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.fixtures.gpu import DEVICE, TOLERANCE, needs_triton
from tests.fixtures.models import load_model

pytestmark = needs_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("around_one", [False, True])
def test_equals_its_twin(dtype: torch.dtype, around_one: bool) -> None:
    from server.kernels.gpu.rms_norm import rms_norm, rms_norm_reference

    torch.manual_seed(0)
    wide = torch.randn(5, 100).to(DEVICE, dtype)
    x, weight = wide[:, 7:80], torch.randn(73).to(DEVICE, dtype)  # rows may lie apart
    ours = rms_norm(x, weight, 1e-5, around_one=around_one)
    twin = rms_norm_reference(x, weight, 1e-5, around_one=around_one)
    torch.testing.assert_close(ours.float(), twin.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    heads = x.reshape(1, 5, 1, 73)
    assert torch.equal(rms_norm(heads, weight, 1e-5, around_one=around_one).view(5, 73), ours)
    assert rms_norm(x[:0], weight, 1e-5, around_one=around_one).shape == (0, 73)


@pytest.mark.parametrize(
    ("family", "norms", "around_one"),
    [("llama", 5, False), ("qwen3", 9, False), ("gemma2", 9, True), ("gpt2", 0, False)],
)
def test_tells_a_models_norms(
    tiny_models: Callable[[str], Path], family: str, norms: int, around_one: bool
) -> None:
    from server.engine.cuda.fused_modules import fuse_norms, rms_norm_of

    model = load_model(tiny_models(family)).to(DEVICE)
    kinds = [kind for module in model.modules() if (kind := rms_norm_of(module))]
    assert len(kinds) == norms
    assert all(kind[2] is around_one for kind in kinds)
    ids = torch.arange(12, device=DEVICE)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert fuse_norms(model) == norms
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-3, rtol=1e-4)
