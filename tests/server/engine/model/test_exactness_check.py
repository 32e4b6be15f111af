"""A base comes out of our steps as out of transformers' own classes, or is refused by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from server.engine.engine import Engine
from server.engine.model.exactness_check import ExactnessCheck
from server.errors import StartupError
from server.kernels.cpu.paged_attention import AttentionOptions
from server.messages import Generate, Sampling
from server.settings import Settings
from tests.fixtures.engine import record_logits, run
from tests.fixtures.models import VOCABULARY, load_model

SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
ORIGINAL = 32  # tokens that a base was trained with, before its context was stretched
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [4.0 + i for i in range(8)],
}


def build(folder: Path, name: str, **fields: Any) -> Path:
    """A random base of this class in `folder`."""
    config = getattr(transformers, name)(**SHAPE | fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def longrope(folder: Path) -> Path:
    return build(
        folder / "base", "Phi3Config", rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL
    )


def engine(base: Path, data: Path, **settings: Any) -> Engine:
    fixed = {"kv_bytes": 8 << 20, "max_batch_tokens": 32, "lookup_tokens": 0}
    return Engine(Settings(data_dir=data, threads=1, **fixed | settings), base)


def prompt(length: int) -> list[int]:
    return [(31 * i + length) % VOCABULARY for i in range(length)]


def row(length: int, tokens: int) -> Generate:
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    return Generate(f"{length}", "tenant", prompt(length), sampling)


def by_transformers(base: Path, length: int, tokens: int) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and their logits, each computed anew without a cache: no key is older than its row."""
    model, ids = load_model(base), prompt(length)
    logits = []
    with torch.inference_mode():
        for _ in range(tokens):
            logits.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
            ids.append(int(logits[-1].argmax()))
    return ids[length:], torch.stack(logits)


def test_rows_of_a_longrope_base_have_frequencies_of_their_own(tmp_path: Path) -> None:
    """The second grows past the length where frequencies switch, beside one before and one beyond it."""
    base = longrope(tmp_path)
    served = engine(base, tmp_path)
    assert served.model.rope_switches == (ORIGINAL,)
    logits = record_logits(served)
    asked = [(20, 8), (28, 12), (90, 8)]
    found = run(served, [row(*own) for own in asked])
    again = run(served, [row(*own) for own in asked])  # out of the prefix cache, where that is right
    assert again[2].cached_tokens > 0
    for (length, tokens), done, second in zip(asked, found, again, strict=True):
        expected, reference = by_transformers(base, length, tokens)
        assert done.tokens == second.tokens == expected
        own = torch.stack(logits[f"{length}"])
        for part in torch.split(own, tokens):
            torch.testing.assert_close(part, reference, atol=2e-3, rtol=1e-3)


def test_guesses_do_not_pass_the_switch(tmp_path: Path) -> None:
    base = longrope(tmp_path)
    served = engine(base, tmp_path, lookup_tokens=7)
    expected, _ = by_transformers(base, 24, 40)
    assert run(served, [row(24, 40)])[0].tokens == expected


def test_the_context_ends_where_dynamic_scaling_would_change_old_keys(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    base = build(tmp_path / "base", "LlamaConfig", rope_parameters=rope)
    served = engine(base, tmp_path)
    assert served.base.max_context == SHAPE["max_position_embeddings"]
    expected, _ = by_transformers(base, 200, 8)
    assert run(served, [row(200, 8), row(9, 8)])[0].tokens == expected


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("DiffLlamaConfig", {}, "attends more than once"),
        (
            "GPTBigCodeConfig",
            {"n_embd": 64, "n_head": 4, "n_layer": 2, "num_key_value_heads": 2},
            "key heads of",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_by_name(
    tmp_path: Path, name: str, fields: dict[str, Any], reason: str
) -> None:
    base = build(tmp_path / "base", name, **fields)
    with pytest.raises(StartupError, match=reason):
        engine(base, tmp_path)


def test_scaling_by_position_past_the_trained_length_is_the_class_s(tmp_path: Path) -> None:
    """Its layers are built as Llama's, and differ only where no short prompt looks."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": ORIGINAL,
        "llama_4_scaling_beta": 0.5,
    }
    base = build(tmp_path / "base", "Ministral3Config", rope_parameters=rope, sliding_window=None)
    served = engine(base, tmp_path)
    assert served.model.decoder is None
    expected, _ = by_transformers(base, 90, 8)
    assert run(served, [row(90, 8)])[0].tokens == expected


@pytest.mark.parametrize("window", [8, 100])
def test_a_step_that_computes_otherwise_is_refused(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(tmp_path / "base", "MistralConfig", sliding_window=window)
    engine(base, tmp_path / "right")
    monkeypatch.setattr(
        "server.engine.model.attention.AttentionOptions",
        lambda scale, _window, cap: AttentionOptions(scale, 0, cap),
    )
    with pytest.raises(StartupError, match="of their size away"):
        engine(base, tmp_path / "wrong")


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_a_base_is_asked_once(tmp_path: Path, quantize: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build(tmp_path / "base", "LlamaConfig", hidden_size=128, intermediate_size=128)
    engine(base, tmp_path, quantize=quantize)
    asked = []
    monkeypatch.setattr(ExactnessCheck, "compare", lambda *_: asked.append(1))
    engine(base, tmp_path, quantize=quantize)
    assert not asked
    engine(base, tmp_path, quantize=quantize, max_model_len=128)  # other positions stand at its end
    assert asked


def test_a_folder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    """transformers would draw them at random."""
    base = build(tmp_path / "base", "LlamaConfig")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        StartupError, match=r"no weights for 1 tensors, such as model\.layers\.1\.mlp\.up_proj"
    ):
        engine(base, tmp_path)
