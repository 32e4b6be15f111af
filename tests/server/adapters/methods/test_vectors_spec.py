"""BitFit, BEFT, IA3, LN_TUNING: what is saved is read; what does not fit is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from server.adapters.methods.bitfit import Bitfit, to_beft
from server.adapters.methods.ia3 import Ia3
from server.adapters.methods.interface import Method
from server.adapters.methods.ln_tuning import LnTuning
from server.adapters.sites import Base, Site
from server.adapters.specs.interface import AdapterFiles
from server.errors import InvalidAdapter
from tests.fixtures.adapters import make_beft, make_bitfit, make_ia3, make_ln_tuning
from tests.fixtures.models import quiet
from tests.server.adapters.methods.small import (
    base_of,
    changed,
    gpt2,
    llama,
    read,
    reshaped,
    started,
    weights_of,
)

QV = ["q_proj", "v_proj"]
IA3: dict[str, Any] = {"target_modules": [*QV, "down_proj"], "feedforward_modules": ["down_proj"]}
IA3_GPT2: dict[str, Any] = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}
CASES: dict[str, tuple[Callable[[], Any], Method, Callable[[Any, Path], Path]]] = {
    "bitfit": (llama, Bitfit(), lambda m, f: make_bitfit(m, f, [*QV, "norm"], mode="delta")),
    "bitfit gpt2": (gpt2, Bitfit(), lambda m, f: make_bitfit(m, f, ["c_attn", "ln_f"], mode="delta")),
    "absolute gpt2": (gpt2, Bitfit(), lambda m, f: make_bitfit(m, f, ["c_attn", "ln_1"])),
    "beft": (llama, Bitfit(), lambda m, f: make_beft(m, f, target_modules=QV)),
    "ia3": (llama, Ia3(), lambda m, f: make_ia3(m, f, **IA3)),
    "ia3 gpt2": (gpt2, Ia3(), lambda m, f: make_ia3(m, f, fan_in_fan_out=True, **IA3_GPT2)),
    "ia3 all-linear": (
        llama,
        Ia3(),
        lambda m, f: make_ia3(m, f, target_modules="all-linear", feedforward_modules=[]),
    ),
    "ia3 head": (
        llama,
        Ia3(),
        lambda m, f: make_ia3(m, f, target_modules=["lm_head"], feedforward_modules=[]),
    ),
    "ln_tuning": (llama, LnTuning(), make_ln_tuning),
    "ln_tuning gpt2": (gpt2, LnTuning(), make_ln_tuning),
}
TRAINED = [case for case in CASES if not case.startswith("ln_tuning")]


class Saved:
    def __init__(self, case: str, folder: Path) -> None:
        make, self.method, save = CASES[case]
        self.model = make().eval()
        self.base: Base = base_of(self.model)
        self.folder = save(self.model, folder / "saved")
        self.files: AdapterFiles = read(self.folder)

    def refused(self, files: AdapterFiles, match: str | None = None) -> InvalidAdapter:
        with pytest.raises(InvalidAdapter, match=match) as caught:
            self.method.parse(files, self.base)
        assert len(caught.value.message) < 300
        return caught.value


@pytest.fixture
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Saved:
    return Saved(request.param, tmp_path)


every_case = pytest.mark.parametrize("saved", CASES, indirect=True)


@every_case
def test_every_tensor_is_accounted_for(saved: Saved) -> None:
    spec = saved.method.parse(saved.files, saved.base)
    shapes = saved.method.shapes(spec, saved.base)
    assert shapes == {name: info.shape for name, info in saved.files.tensors.items()}


@pytest.mark.parametrize("saved", TRAINED, indirect=True)
def test_training_starts_as_the_base_with_files_that_are_read_again(saved: Saved, tmp_path: Path) -> None:
    spec = saved.method.parse(saved.files, saved.base)
    if spec.base_copies:
        return  # training would not save the base's tables
    out = started(saved.method, saved.folder, saved.base, tmp_path / "started", weights_of(saved.model))
    if saved.files.config["peft_type"] != "BITFIT":
        ids = torch.tensor([[1, 2, 3]])
        with quiet(), torch.inference_mode():
            before = saved.model(ids).logits
            adapted = PeftModel.from_pretrained(saved.model, out)
            assert torch.equal(adapted(ids).logits, before)


@pytest.mark.parametrize("saved", ["ln_tuning"], indirect=True)
def test_not_every_method_is_trained(saved: Saved) -> None:
    spec = saved.method.parse(saved.files, saved.base)
    with pytest.raises(InvalidAdapter, match="trained"):
        saved.method.init(spec, saved.base, {}, torch.Generator())


@pytest.mark.parametrize("saved", ["absolute gpt2"], indirect=True)
def test_absolute_biases_start_as_the_bases_own(saved: Saved) -> None:
    spec, weights = saved.method.parse(saved.files, saved.base), weights_of(saved.model)
    tensors = saved.method.init(spec, saved.base, weights, torch.Generator())
    assert not saved.method.pack(spec, saved.base, tensors, weights, torch.float32).flat.any()


@every_case
def test_wrong_shapes_are_refused_by_name(saved: Saved) -> None:
    for name, info in saved.files.tensors.items():
        for shape in [
            (*info.shape, 1),
            (*info.shape[:-1], info.shape[-1] + 1),
            (info.shape[0] + 1, 3),
            (7, 1),
        ]:
            wrong = saved.files.tensors | {name: reshaped(info, *shape)}
            assert saved.refused(changed(saved.files, wrong)).param == name


@every_case
def test_a_tensor_of_nothing_we_serve_is_refused_by_name(saved: Saved) -> None:
    info = next(iter(saved.files.tensors.values()))
    endings = {name.rsplit(".", 1)[1] for name in saved.files.tensors}
    for stray in (
        "model.layers.9.self_attn.q_proj.bias",
        "model.layers.9.self_attn.q_proj.ia3_l",
        "model.layers.0.self_attn.q_proj.ia3_m",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj",
        "model.layers.9.input_layernorm.ln_tuning_layers.weight",
        "model.embed_tokens.bias",
        "model.embed_tokens.ia3_l",
        "model.embed_tokens.beft_bias",
        "model.embed_tokens.ln_tuning_layers.weight",
        "prompt_embeddings",
        "../../etc/passwd.bias",
        ".bias",
        "bias",
        "x" * 200,
        *(f"transformer.h.7.attn.c_attn.{ending}" for ending in endings),
    ):
        name = f"base_model.model.{stray}"
        assert saved.refused(changed(saved.files, saved.files.tensors | {name: info})).param == name


@every_case
def test_the_same_thing_twice_is_refused(saved: Saved) -> None:
    name, info = next(iter(saved.files.tensors.items()))
    again = name.removeprefix("base_model.model.")
    saved.refused(changed(saved.files, saved.files.tensors | {again: info}), "says the same as")
    only = {name.removeprefix("base_model.model."): info for name, info in saved.files.tensors.items()}
    saved.method.parse(changed(saved.files, only), saved.base)  # names without the prefix are read


@every_case
def test_the_config_and_the_tensors_speak_of_the_same_modules(saved: Saved) -> None:
    saved.refused(changed(saved.files, {}), "no tensors")
    saved.refused(changed(saved.files, target_modules=["o_proj"]), "target_modules")
    if saved.files.config["target_modules"]:
        name = next(name for name in saved.files.tensors if not name.endswith(("base_layer.weight", ".bias")))
        module = name.rsplit(".", 2 if "ln_tuning" in name else 1)[0]
        rest = {n: i for n, i in saved.files.tensors.items() if not n.startswith(f"{module}.")}
        saved.refused(changed(saved.files, rest))


@every_case
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", [1]),
        ("modules_to_save", ["lm_head"]),
        ("task_type", "SEQ_CLS"),
        ("peft_type", "VERA"),
        ("surprise", 1),
    ],
)
def test_fields_that_ask_for_something_else_are_refused(saved: Saved, field: str, value: Any) -> None:
    assert field in saved.refused(changed(saved.files, **{field: value})).message


@every_case
def test_a_config_of_another_method_is_refused(saved: Saved) -> None:
    files = AdapterFiles({"peft_type": "LORA", "r": 1, "lora_alpha": 1}, saved.files.tensors)
    assert saved.refused(files).param in ("peft_type", "adapter_config")


@pytest.mark.parametrize("saved", ["bitfit"], indirect=True)
def test_bias_mode_must_be_said(saved: Saved) -> None:
    without = {name: value for name, value in saved.files.config.items() if name != "bias_mode"}
    for config in (without, *(without | {"bias_mode": mode} for mode in ("add", None, 1, ["delta"]))):
        saved.refused(AdapterFiles(config, saved.files.tensors), "bias_mode")


@pytest.mark.parametrize("saved", ["bitfit", "ln_tuning"], indirect=True)
def test_norms_inside_attention_are_refused(saved: Saved) -> None:
    site = Site("model.layers.0.self_attn.q_norm", "norm", 4, 4, bias=False)
    saved.base.sites[site.name] = site
    ending = "bias" if isinstance(saved.method, Bitfit) else "ln_tuning_layers.weight"
    name = f"base_model.model.{site.name}.{ending}"
    info = reshaped(next(iter(saved.files.tensors.values())), 4)
    fault = saved.refused(changed(saved.files, saved.files.tensors | {name: info}), "inside attention")
    assert fault.param == name


@pytest.mark.parametrize("saved", ["ln_tuning", "ln_tuning gpt2"], indirect=True)
def test_a_norm_has_a_bias_where_the_bases_has_one(saved: Saved) -> None:
    name = next(name for name in saved.files.tensors if name.endswith("weight"))
    bias = f"{name.removesuffix('weight')}bias"
    tensors = dict(saved.files.tensors)
    if bias in tensors:
        del tensors[bias]
    else:
        tensors[bias] = tensors[name]
    saved.refused(changed(saved.files, tensors))


@every_case
def test_an_expression_says_nothing_that_the_tensors_do_not(saved: Saved) -> None:
    spec = saved.method.parse(saved.files, saved.base)
    fields = {"target_modules", "exclude_modules", "feedforward_modules"} & saved.files.config.keys()
    for expression in ("q_proj", r".*\.(q_proj|v_proj)$", "(a+)+$", "["):
        config: dict[str, Any] = dict.fromkeys(fields, expression)
        assert saved.method.parse(changed(saved.files, **config), saved.base) == spec


@pytest.mark.parametrize("saved", ["ia3"], indirect=True)
def test_feed_forward_modules_decide_what_is_scaled(saved: Saved) -> None:
    saved.refused(changed(saved.files, feedforward_modules=[]), "down_proj")
    saved.refused(changed(saved.files, feedforward_modules=["down_proj", "q_proj"]), "q_proj")
    unsaid = saved.method.parse(changed(saved.files, feedforward_modules=None), saved.base)
    assert unsaid == saved.method.parse(saved.files, saved.base), "the shapes say it, too"


@pytest.mark.parametrize("saved", ["absolute gpt2"], indirect=True)
def test_absolute_biases_are_served_as_differences(saved: Saved) -> None:
    spec = saved.method.parse(saved.files, saved.base)
    weights = {n: p.detach() for n, p in saved.model.named_parameters() if n.endswith("bias")}
    same = {f"base_model.model.{name}": bias for name, bias in weights.items()}
    tensors = {name: same[name] + (1 if "ln_1" in name else 0) for name in saved.files.tensors}
    packed = saved.method.pack(spec, saved.base, tensors, weights, torch.float32)
    deltas = torch.split(packed.flat, [piece.shape[0] for piece in packed.layout])
    found = {piece.site: delta for piece, delta in zip(packed.layout, deltas, strict=True)}
    for site, delta in found.items():
        assert delta.tolist() == pytest.approx([1.0 if "ln_1" in site else 0.0] * len(delta), abs=1e-6)
    assert packed.summable


@pytest.mark.parametrize("saved", ["bitfit", "bitfit gpt2"], indirect=True)
def test_what_beft_cannot_hold_is_not_exported(saved: Saved) -> None:
    spec = Bitfit().parse(saved.files, saved.base)
    with pytest.raises(InvalidAdapter, match="no plain linear layer"):
        to_beft(spec, saved.base, {}, {})


@pytest.mark.parametrize("saved", ["ia3"], indirect=True)
def test_scales_do_not_add_up(saved: Saved) -> None:
    spec = saved.method.parse(saved.files, saved.base)
    tensors = {name: torch.ones(info.shape) for name, info in saved.files.tensors.items()}
    assert not saved.method.pack(spec, saved.base, tensors, {}, torch.float32).summable
