"""Adapters in bfloat16: half the bytes, and nothing lost unless the base has been rounded, too."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.kernels.cpu.openmp import AVAILABLE
from server.messages import AdapterRef, Generate, Sampling, Use
from tests.fixtures.engine import LINEARS, Stand, publish, record_logits, run
from tests.fixtures.models import make_lora

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs numba and libgomp")


def published(s: Stand, folder: Path, name: str, dtype: torch.dtype) -> AdapterRef:
    """The adapter in this dtype, its numbers rounded to bfloat16."""
    (weights,) = folder.glob("*.safetensors")
    rounded = {key: tensor.bfloat16().to(dtype) for key, tensor in load_file(weights).items()}
    own = folder.parent / name
    own.mkdir()
    (own / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    save_file(rounded, own / weights.name)
    return publish(s.objects, s.engine.base, own)


def trained(s: Stand, folder: Path, **config: Any) -> Path:
    given: dict[str, Any] = {"r": 5, "lora_alpha": 10, "target_modules": LINEARS["llama"]} | config
    return make_lora(s.base, folder, **given)


def held(s: Stand, ref: AdapterRef) -> torch.Tensor:
    flat: torch.Tensor = s.engine.cache.by_digest[ref.digest].packed.flat
    return flat


def logits(s: Stand, refs: list[AdapterRef]) -> list[torch.Tensor]:
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = record_logits(s.engine)
    done = run(
        s.engine, [Generate(f"{i}", "t", s.prompt(0, 17), sampling, ref) for i, ref in enumerate(refs)]
    )
    assert not any(each.error for each in done)
    return [torch.stack(found[f"{i}"]) for i in range(len(refs))]


def test_what_was_trained_in_bfloat16_stays_so(stand: Callable[..., Stand], tmp_path: Path) -> None:
    s = stand("llama", 0, lookup_tokens=0)
    folder = trained(s, tmp_path / "lora")
    half = published(s, folder, "half", torch.bfloat16)
    whole = published(s, folder, "whole", torch.float32)
    first, second = logits(s, [half, whole])
    assert torch.equal(first, second)
    assert (held(s, half).dtype, held(s, whole).dtype) == (torch.bfloat16, torch.float32)
    assert 2 * held(s, half).nbytes == held(s, whole).nbytes


@pytest.mark.parametrize("config", [{"lora_alpha": 15}, {"use_dora": True}, {"lora_bias": True}])
def test_what_would_be_rounded_is_not_narrowed(
    stand: Callable[..., Stand], tmp_path: Path, config: dict[str, Any]
) -> None:
    s = stand("llama", 0, lookup_tokens=0)
    ref = published(s, trained(s, tmp_path / "lora", **config), "half", torch.bfloat16)
    logits(s, [ref])
    assert held(s, ref).dtype == torch.float32


def test_beside_an_int8_base_all_matrices_are_narrow(stand: Callable[..., Stand], tmp_path: Path) -> None:
    s, plain = (stand("llama", 0, lookup_tokens=0, quantize=kind) for kind in ("int8", "none"))
    folder = trained(s, tmp_path / "lora", lora_alpha=15)
    ref = publish(s.objects, s.engine.base, folder)
    other = publish(plain.objects, plain.engine.base, folder)
    (rounded,), (exact,) = logits(s, [ref]), logits(plain, [other])
    assert held(s, ref).dtype == torch.bfloat16
    assert held(plain, other).dtype == torch.float32
    assert (rounded[0] - exact[0]).norm() < 0.1 * exact[0].norm()


def test_an_option_makes_them_narrow_beside_a_float32_base(
    stand: Callable[..., Stand], tmp_path: Path
) -> None:
    """What was rounded by hand has the same bits."""
    s, plain = (stand("llama", 0, lookup_tokens=0, lora_dtype=dtype) for dtype in ("bfloat16", "auto"))
    folder = trained(s, tmp_path / "lora")
    ref = publish(s.objects, s.engine.base, folder)
    other = published(plain, folder, "by-hand", torch.float32)
    (rounded,), (exact,) = logits(s, [ref]), logits(plain, [other])
    assert (held(s, ref).dtype, held(plain, other).dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(rounded, exact)


def test_sums_of_narrow_adapters(stand: Callable[..., Stand], tmp_path: Path) -> None:
    """Weighted rows go through torch, not through the kernel."""
    s = stand("llama", 0, lookup_tokens=0)
    folder = trained(s, tmp_path / "lora")
    refs = [
        published(s, folder, "half", torch.bfloat16),
        published(s, folder, "whole", torch.float32),
    ]
    sampling = Sampling(max_tokens=8, temperature=0.0, ignore_eos=True)
    found = record_logits(s.engine)
    rows = [
        Generate(f"{i}", "t", s.prompt(0, 17), sampling, None, (Use(ref, 0.5), Use(ref, 0.25)))
        for i, ref in enumerate(refs)
    ]
    assert not any(done.error for done in run(s.engine, rows))
    first, second = (torch.stack(found[row.id]) for row in rows)
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
