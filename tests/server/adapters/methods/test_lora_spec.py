"""What PEFT saves is read as PEFT meant it; what does not fit is refused by the tensor's name."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from server.adapters.formats.safetensors import TensorInfo
from server.adapters.methods import build_methods
from server.adapters.methods.lora import Lora
from server.adapters.specs.interface import AdapterFiles
from server.adapters.specs.lora import LoraSpec
from server.errors import InvalidAdapter
from tests.server.adapters.methods.small import base_of, gpt2, llama, read, reshaped, weights_of


class Saved:
    """An adapter as PEFT saved it, beside the model that PEFT made of it."""

    def __init__(self, make: Callable[[], Any], folder: Path, **config: Any) -> None:
        model = make()
        self.base = base_of(model)
        self.weights = weights_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT has advice on each of these
            self.model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
            self.model.save_pretrained(folder)
        files = read(folder)
        self.config, self.tensors = files.config, files.tensors

    def parse(self, max_rank: int = 256) -> LoraSpec:
        return Lora(max_rank).parse(AdapterFiles(self.config, self.tensors), self.base)

    def parse_changed(self, tensors: dict[str, TensorInfo], **config: Any) -> LoraSpec:
        return Lora().parse(AdapterFiles(self.config | config, tensors), self.base)


LLAMA_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.v_proj": 2, r"^model.layers.\d+.mlp.up_proj": 8},
        "alpha_pattern": {"q_proj": 32, r".*\.1\.mlp\.up_proj": 5},
        "target_modules": ["q_proj", "v_proj", "up_proj"],
    },
    "all-linear": {"r": 2, "target_modules": "all-linear"},
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
    "head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "lora_bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj"]},
    "whole tables": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm", "input_layernorm"]},
    "an expression": {"r": 4, "target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*\.1\..*q_proj"},
    "alternatives": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {r"layers\.(0|1)\.self_attn\.[kv]_proj": 2},
        "alpha_pattern": {"0.self_attn.(?:q|k)_proj|up_proj": 32},
    },
    "some layers": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "a layer, and one named": {
        "r": 4,
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "excluded": {"r": 4, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
}
GPT2_CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "target_modules": ["c_attn"]},
    "dora": {"r": 4, "use_dora": True, "target_modules": ["c_attn", "c_proj", "lm_head"]},
    "all-linear": {"r": 4, "lora_bias": True, "target_modules": "all-linear"},
    "embedding": {"r": 4, "target_modules": ["wte"]},
    "norms": {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["ln_1", "ln_f"]},
    "bias all": {"r": 4, "bias": "all", "target_modules": ["c_attn"]},
    "bias lora_only": {"r": 4, "bias": "lora_only", "target_modules": ["c_attn", "c_fc"]},
}
CASES = [(llama, c) for c in LLAMA_CASES.values()] + [(gpt2, c) for c in GPT2_CASES.values()]
IDS = [f"llama {name}" for name in LLAMA_CASES] + [f"gpt2 {name}" for name in GPT2_CASES]


@pytest.mark.parametrize(("make", "config"), CASES, ids=IDS)
def test_targets_ranks_and_scalings_are_pefts(
    make: Callable[[], Any], config: dict[str, Any], tmp_path: Path
) -> None:
    saved = Saved(make, tmp_path, **config)
    spec = saved.parse()
    layers = {n: m for n, m in saved.model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert {t.site: t.rank for t in spec.targets} == {n: layer.r["default"] for n, layer in layers.items()}
    for target in spec.targets:
        assert target.scaling == pytest.approx(layers[target.site].scaling["default"])
    shapes = Lora().shapes(spec, saved.base)
    assert shapes == {name: info.shape for name, info in saved.tensors.items()}, (
        "every tensor is accounted for"
    )
    assert all((t.magnitude is not None) == config.get("use_dora", False) for t in spec.targets)
    assert all((t.bias is not None) == config.get("lora_bias", False) for t in spec.targets)
    assert spec.rank == max(t.rank for t in spec.targets)


def test_whole_tables_are_named_for_the_loader_to_compare(tmp_path: Path) -> None:
    saved = Saved(llama, tmp_path, **LLAMA_CASES["whole tables"])
    prefix = "base_model.model."
    assert saved.parse().base_copies == {
        f"{prefix}lm_head.weight": "lm_head",
        f"{prefix}model.embed_tokens.weight": "model.embed_tokens",
    }
    saved = Saved(llama, tmp_path / "e", **LLAMA_CASES["embedding"])
    assert saved.parse().base_copies == {
        f"{prefix}model.embed_tokens.base_layer.weight": "model.embed_tokens"
    }


@pytest.mark.parametrize("make", [llama, gpt2])
def test_norms_that_were_trained_beside(make: Callable[[], Any], tmp_path: Path) -> None:
    cases = LLAMA_CASES if make is llama else GPT2_CASES
    saved = Saved(make, tmp_path, **cases["norms"])
    spec = saved.parse()
    ends = tuple(cases["norms"]["modules_to_save"])
    assert spec.norms.keys() == {name for name in saved.base.sites if name.endswith(ends)}
    norm = "base_model.model." + ("model.norm" if make is llama else "transformer.ln_f")
    start = Lora().init(spec, saved.base, saved.weights, torch.Generator())
    assert torch.equal(start[f"{norm}.weight"], saved.weights[norm.removeprefix("base_model.model.")])
    assert not Lora().pack(spec, saved.base, start, saved.weights, torch.float32).summable
    unsaid = saved.parse_changed(saved.tensors, modules_to_save=None)
    assert unsaid == spec, "PEFT loads what is there"
    half = dict(saved.tensors)
    if make is gpt2:
        del half[f"{norm}.bias"]
    else:
        half[f"{norm}.bias"] = half[f"{norm}.weight"]
    with pytest.raises(InvalidAdapter, match="stands alone" if make is gpt2 else "norm without a bias"):
        saved.parse_changed(half)
    with pytest.raises(InvalidAdapter, match="modules_to_save names 'q_norm'"):
        saved.parse_changed(saved.tensors, modules_to_save=["q_norm"])


def test_tying_matters_only_to_tables(tmp_path: Path) -> None:
    plain = Saved(llama, tmp_path, **LLAMA_CASES["plain"])
    assert plain.parse_changed(plain.tensors, ensure_weight_tying=True) == plain.parse()
    for case in ("embedding", "head"):
        saved = Saved(llama, tmp_path / case, **LLAMA_CASES[case])
        with pytest.raises(InvalidAdapter, match="both tables"):
            saved.parse_changed(saved.tensors, ensure_weight_tying=True)


def test_names_without_prefix_or_with_the_adapters_name_are_read(tmp_path: Path) -> None:
    saved = Saved(llama, tmp_path, **LLAMA_CASES["plain"])
    bare = {name.removeprefix("base_model.model."): info for name, info in saved.tensors.items()}
    named = {name.replace(".weight", ".default.weight"): info for name, info in saved.tensors.items()}
    for tensors in (bare, named):
        spec = saved.parse_changed(tensors)
        assert [t.site for t in spec.targets] == [t.site for t in saved.parse().targets]
    with pytest.raises(InvalidAdapter, match="says the same as"):
        saved.parse_changed(bare | named)


@pytest.fixture
def plain(tmp_path: Path) -> Saved:
    return Saved(llama, tmp_path, **LLAMA_CASES["plain"])


def test_wrong_shapes_are_refused_by_name(plain: Saved) -> None:
    for name, (rows, columns) in ((n, i.shape) for n, i in plain.tensors.items()):
        for shape in [(rows, columns + 1), (rows + 1, columns), (columns * rows,), (rows, columns, 1)]:
            with pytest.raises(InvalidAdapter) as caught:
                plain.parse_changed(plain.tensors | {name: reshaped(plain.tensors[name], *shape)})
            assert caught.value.param == name


def test_a_missing_tensor_is_refused(plain: Saved) -> None:
    for name in plain.tensors:
        rest = {n: i for n, i in plain.tensors.items() if n != name}
        with pytest.raises(InvalidAdapter, match="counterpart"):
            plain.parse_changed(rest)
    first_layer = {n: i for n, i in plain.tensors.items() if "layers.0" in n}
    with pytest.raises(InvalidAdapter, match="target_modules"):
        plain.parse_changed(first_layer)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.9.self_attn.q_proj.lora_A.weight",
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_C.weight",
        "model.layers.0.self_attn.q_proj.lora_A.bias",
        "model.embed_tokens.lora_A.weight",
        "model.norm.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_embedding_A",
        "model.layers.0.self_attn.q_proj.base_layer.bias",
        "model.norm.weight",  # of the wrong shape
        "model.norm.bias",
        "../../etc/passwd",
        "x",
        "model.embed_tokens.token_adapter.trainable_tokens_delta",
        "prompt_embeddings",
    ],
)
def test_a_tensor_of_nothing_we_serve_is_refused(plain: Saved, name: str) -> None:
    name = f"base_model.model.{name}"
    info = next(iter(plain.tensors.values()))
    with pytest.raises(InvalidAdapter) as caught:
        plain.parse_changed(plain.tensors | {name: info})
    assert caught.value.param == name


def test_whole_conv1d_weights_are_refused(tmp_path: Path) -> None:
    saved = Saved(gpt2, tmp_path, **GPT2_CASES["plain"])
    name = "base_model.model.transformer.h.0.mlp.c_fc.weight"
    with pytest.raises(InvalidAdapter, match="replaces weights of the base"):
        saved.parse_changed(saved.tensors | {name: reshaped(next(iter(saved.tensors.values())), 16, 64)})


def test_no_matching_module_is_refused(plain: Saved) -> None:
    with pytest.raises(InvalidAdapter, match="no tensors for any module"):
        plain.parse_changed({})
    with pytest.raises(InvalidAdapter, match="no module of the base"):
        Lora().parse(AdapterFiles(plain.config, plain.tensors), base_of(gpt2()))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"r": 8}, "rank 4"),
        ({"rank_pattern": [["q_proj", 2]]}, "rank 4"),
        ({"use_dora": True}, "magnitude"),
        ({"lora_bias": True}, "bias"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "up_proj"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"alpha_pattern": [["(a+)+$", 1]]}, "alpha_pattern"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_config_that_says_something_else_is_refused(
    plain: Saved, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(InvalidAdapter, match=fault):
        plain.parse_changed(plain.tensors, **change)


def test_what_the_config_does_not_ask_for_is_refused(tmp_path: Path) -> None:
    for case, field in (("dora", "use_dora"), ("lora_bias", "lora_bias")):
        saved = Saved(llama, tmp_path / case, **LLAMA_CASES[case])
        with pytest.raises(InvalidAdapter, match="does not ask"):
            saved.parse_changed(saved.tensors, **{field: False})


def test_exactly_the_biases_that_the_config_says_are_there(tmp_path: Path) -> None:
    every, some = (
        Saved(gpt2, tmp_path / case, **GPT2_CASES[f"bias {case}"]) for case in ("all", "lora_only")
    )
    assert set(every.parse().biases) == {name for name, site in every.base.sites.items() if site.bias}
    assert set(some.parse().biases) == {target.site for target in some.parse().targets}
    norm = "base_model.model.transformer.h.0.ln_1.bias"
    without = {name: info for name, info in every.tensors.items() if name != norm}
    for saved, tensors, bias, fault in (
        (every, every.tensors, "none", "bias is 'none'"),
        (every, every.tensors, "lora_only", "bias is 'lora_only'"),
        (some, some.tensors, "all", "no tensor for the bias"),
        (every, without, "all", "ln_1"),
        (some, some.tensors | {norm: every.tensors[norm]}, "lora_only", "ln_1"),
    ):
        with pytest.raises(InvalidAdapter, match=fault):
            saved.parse_changed(tensors, bias=bias)


def test_the_rank_limit_is_named(plain: Saved) -> None:
    assert plain.parse(max_rank=4).rank == 4
    with pytest.raises(InvalidAdapter, match="3 at most"):
        build_methods(max_rank=3)["lora"].parse(AdapterFiles(plain.config, plain.tensors), plain.base)


def test_dora_on_an_embedding_is_refused(tmp_path: Path) -> None:
    saved = Saved(llama, tmp_path, r=4, use_dora=True, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(InvalidAdapter, match="use_dora"):
        saved.parse()


STARTS = ["plain", "patterns", "embedding", "lora_bias", "dora", "norms"]
STARTS_GPT2 = ["norms", "dora", "bias all", "bias lora_only"]


@pytest.mark.parametrize(
    ("make", "config"),
    [(llama, LLAMA_CASES[case]) for case in STARTS] + [(gpt2, GPT2_CASES[case]) for case in STARTS_GPT2],
    ids=[*STARTS, *(f"gpt2 {case}" for case in STARTS_GPT2)],
)
def test_training_starts_as_the_base_with_the_tensors_of_shapes(
    make: Callable[[], Any], config: dict[str, Any], tmp_path: Path
) -> None:
    saved = Saved(make, tmp_path, **config)
    spec = saved.parse()
    lora = Lora()
    tensors = lora.init(spec, saved.base, saved.weights, torch.Generator().manual_seed(1))
    shapes = lora.shapes(spec, saved.base)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        n: s for n, s in shapes.items() if n not in spec.base_copies
    }
    for target in spec.targets:
        a, b = tensors[target.A], tensors[target.B]
        assert not (b @ a).any()
        assert a.any() or b.any(), "nothing would ever be learned"
    again = lora.init(spec, saved.base, saved.weights, torch.Generator().manual_seed(1))
    assert all(torch.equal(tensors[n], again[n]) for n in tensors)
    own = {name: p for name, p in saved.model.state_dict().items() if "magnitude" in name}
    assert len(own) == len([t for t in spec.targets if t.magnitude])
    for name, magnitude in own.items():
        ours = tensors[name.replace(".default", "").removesuffix(".weight")]
        assert torch.allclose(ours, magnitude), "PEFT starts there, too"


def test_kept_config_survives_the_manifest(tmp_path: Path) -> None:
    saved = Saved(llama, tmp_path, **LLAMA_CASES["patterns"])
    reread = json.loads(json.dumps(saved.config, sort_keys=True))
    assert Lora().parse(AdapterFiles(reread, saved.tensors), saved.base) == saved.parse()


@pytest.mark.parametrize(
    "config",
    [
        {"exclude_modules": ["v_proj"]},
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"layers_to_transform": 1},
        {"layers_to_transform": [0]},
        {"layers_to_transform": [7]},
    ],
    ids=str,
)
def test_tensors_that_peft_would_not_use_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    saved = Saved(llama, tmp_path, r=4, target_modules=["q_proj", "v_proj"])
    with pytest.raises(InvalidAdapter, match=f"{next(iter(config))} leaves out"):
        saved.parse_changed(saved.tensors, **config)
