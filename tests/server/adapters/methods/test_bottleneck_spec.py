"""What AdapterHub saves is read as it meant it; what does not fit is refused by the tensor's name."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from server.adapters.formats.detect import read_config
from server.adapters.formats.safetensors import TensorInfo, read_header
from server.adapters.methods.bottleneck import Bottleneck
from server.adapters.sites import Base, Site
from server.adapters.specs.bottleneck import BottleneckSpec
from server.adapters.specs.interface import AdapterFiles
from server.errors import InvalidAdapter

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "adapterhub"
HIDDEN, LAYERS = 32, 2
WRITTEN = sorted(path.parent for path in GOLDEN.glob("*/*/adapter.safetensors"))
Tensors = dict[str, TensorInfo]


def base_of(family: str) -> Base:
    layers, attention = ("transformer.h", "attn") if family == "gpt2" else ("model.layers", "self_attn")
    sites = []
    for i in range(LAYERS):
        sites.append(Site(f"{layers}.{i}.{attention}", "attention", HIDDEN, HIDDEN, bias=False))
        sites.append(Site(f"{layers}.{i}.mlp", "mlp", HIDDEN, HIDDEN, bias=False))
        sites.append(Site(f"{layers}.{i}.mlp.down_proj", "linear", 48, HIDDEN, bias=False))
        norms = ["post_attention_layernorm"]
        if family == "gemma2":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        sites += [Site(f"{layers}.{i}.{norm}", "norm", HIDDEN, HIDDEN, False, epsilon=0.5) for norm in norms]
    return Base("b", family, "0" * 64, LAYERS, HIDDEN, 2, 8, 100, 128, {site.name: site for site in sites})


def files_of(folder: Path) -> AdapterFiles:
    path = folder / "adapter.safetensors"
    with path.open("rb") as file:
        header = read_header(file, path.stat().st_size, max_header_bytes=1 << 20, max_tensors=1000)
    return AdapterFiles(read_config((folder / "adapter_config.json").read_bytes()), header)


def parse(tensors: Tensors | None = None, adapter: str = "double_seq_bn", **config: Any) -> BottleneckSpec:
    files = files_of(GOLDEN / "llama" / adapter)
    changed = files.config | {"config": files.config["config"] | config}
    return Bottleneck().parse(AdapterFiles(changed, files.tensors if tensors is None else tensors), BASE)


BASE = base_of("llama")
GOOD = files_of(GOLDEN / "llama" / "double_seq_bn").tensors
LAYER = "model.layers.0.output_adapters.adapters.tuned"


@pytest.mark.parametrize("folder", WRITTEN, ids=lambda path: "-".join(path.parts[-2:]))
def test_all_the_library_writes_is_read(folder: Path) -> None:
    files, base = files_of(folder), base_of(folder.parent.name)
    method = Bottleneck()
    spec = method.parse(files, base)
    assert method.shapes(spec, base) == {name: info.shape for name, info in files.tensors.items()}
    started = method.init(spec, base, {}, torch.Generator().manual_seed(0))
    assert {name: tuple(t.shape) for name, t in started.items()} == method.shapes(spec, base)
    gains = {name: torch.rand(HIDDEN) for name, site in base.sites.items() if site.kind == "norm"}
    packed = method.pack(spec, base, load_file(folder / "adapter.safetensors"), gains, torch.float32)
    assert packed.nbytes == 4 * sum(
        math.prod(shape) for name, shape in method.shapes(spec, base).items() if "scaling" not in name
    )


def test_widths_by_layer_and_left_out_layers() -> None:
    widths = {t.site: t.width for t in parse(adapter="factors").targets}
    assert {site.split(".")[2]: width for site, width in widths.items()} == {"0": 8, "1": 1}
    assert {t.site.split(".")[2] for t in parse(adapter="leave_out").targets} == {"0"}
    assert parse(adapter="factors").rank == 8


def test_a_norm_behind_the_block_is_the_last_layers() -> None:
    base = base_of("gemma2")
    spec = Bottleneck().parse(files_of(GOLDEN / "gemma2" / "legacy"), base)
    last = "model.layers.1."
    norms = {"attention": last + "post_attention_layernorm", "mlp": last + "post_feedforward_layernorm"}
    assert [t.norm for t in spec.targets] == [norms[base.sites[t.site].kind] for t in spec.targets]
    plain = Bottleneck().parse(files_of(GOLDEN / "gemma2" / "double_seq_bn"), base)
    assert {t.norm for t in plain.targets} == {None}
    files = files_of(GOLDEN / "gemma2" / "seq_bn")
    config = files.config["config"] | {"original_ln_after": False, "residual_before_ln": False}
    with pytest.raises(InvalidAdapter, match="original_ln_after must be true"):
        Bottleneck().parse(AdapterFiles(files.config | {"config": config}, files.tensors), base)


def renamed(change: Callable[[str], str]) -> Tensors:
    return {change(name): info for name, info in GOOD.items()}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".tuned.", ".another-name."),
        ("model.layers", "layers"),
        ("output_adapters.adapters", "output_adapters.layer_text_lang_adapters"),
        ("attention_adapters.adapters", "attention_adapters.attention_text_task_adapters"),
    ],
)
def test_names_that_mean_the_same(old: str, new: str) -> None:
    expected = [(t.site, t.width) for t in parse().targets]
    assert [
        (t.site, t.width) for t in parse(renamed(lambda name: name.replace(old, new))).targets
    ] == expected


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        LAYER,
        f"{LAYER}.gate.weight",
        f"{LAYER}.adapter_down.1.weight",
        f"{LAYER}.adapter_norm_before.weight",
        f"{LAYER}.adapter_up.weight.",
        LAYER.replace(".0.", ".2.") + ".adapter_up.weight",
        LAYER.replace(".0.", ".00.") + ".adapter_up.weight",
        LAYER.replace("model.", "base_model.model.model.") + ".adapter_up.weight",
        LAYER.replace("output_adapters", "cross_attention_adapters") + ".adapter_up.weight",
        LAYER.replace(".adapters.", ".adapter_fusion_layer.") + ".adapter_up.weight",
        f"{LAYER}.more.adapter_up.weight",
        "model.invertible_adapters.tuned.F.0.weight",
        ".output_adapters.adapters.tuned.adapter_up.weight",
        "output_adapters",
        ".",
    ],
)
def test_strange_tensors_are_refused(name: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        parse(GOOD | {name: TensorInfo("F32", (2,), 0, 8)})
    assert caught.value.param in (name, "files")


def test_tensors_and_config_must_agree() -> None:
    one = TensorInfo("F32", (1,), 0, 4)
    up_bias = f"{LAYER}.adapter_up.bias"
    part = {name: info for name, info in GOOD.items() if "0.output" not in name}
    cases: list[tuple[Tensors, dict[str, Any], str]] = [
        ({}, {}, "no down for"),
        (part, {}, "which its config names"),
        ({name: info for name, info in GOOD.items() if name != up_bias}, {}, "no up_bias for"),
        (GOOD, {"mh_adapter": False}, "leaves out"),
        (GOOD, {"leave_out": [1]}, "leaves out"),
        (GOOD, {"leave_out": [0, 1]}, "leaves out"),
        ({}, {"leave_out": [0, 1]}, "leaves no layer"),
        (GOOD, {"reduction_factor": 8}, "must be"),
        (GOOD, {"reduction_factor": 0.001}, "at most"),
        (GOOD, {"reduction_factor": {"0": 16}}, "neither layer 1 nor a default"),
        (GOOD, {"scaling": "learned"}, "no scaling for"),
        (GOOD | {f"{LAYER}.scaling": one}, {}, "does not ask for it"),
        (GOOD | {up_bias.replace("tuned", "two"): one}, {}, "says the same"),
        (GOOD | {up_bias.replace("model.", ""): one}, {}, "says the same"),
        (GOOD | {up_bias: TensorInfo("F32", (HIDDEN, 1), 0, 128)}, {}, "must be"),
        (renamed(lambda name: name.replace(LAYER, LAYER.replace("tuned", "two"))), {}, "2 adapters"),
    ]
    for tensors, config, match in cases:
        with pytest.raises(InvalidAdapter, match=match):
            parse(tensors, **config)


def test_a_base_of_another_kind_is_refused() -> None:
    files = files_of(GOLDEN / "llama" / "par_bn")
    with pytest.raises(InvalidAdapter, match="this server runs a mistral"):
        Bottleneck().parse(files, base_of("mistral"))
    bare = Base("b", "llama", "0" * 64, LAYERS, HIDDEN, 2, 8, 100, 128, {})
    with pytest.raises(InvalidAdapter):
        Bottleneck().parse(files, bare)


def test_a_scaling_that_overflows_is_refused() -> None:
    spec = parse(scaling=1e6)
    tensors = {name: torch.full(shape, 1e35) for name, shape in Bottleneck().shapes(spec, BASE).items()}
    with pytest.raises(InvalidAdapter, match="overflows float32"):
        Bottleneck().pack(spec, BASE, tensors, {}, torch.float32)


def test_parallel_adapters_start_as_the_base() -> None:
    spec = parse(files_of(GOLDEN / "llama" / "par_bn").tensors, "par_bn")
    tensors = Bottleneck().init(spec, BASE, {}, torch.Generator().manual_seed(0))
    assert all(not tensors[target.up].any() and tensors[target.down].any() for target in spec.targets)


@given(
    st.dictionaries(
        st.sampled_from(sorted(GOOD))
        | st.text("abl.0_", max_size=40).map(lambda tail: f"model.layers.{tail}"),
        st.lists(st.integers(1, 64), max_size=3),
        max_size=8,
    )
)
def test_any_header_is_read_or_refused(shapes: dict[str, list[int]]) -> None:
    tensors = GOOD | {name: TensorInfo("F32", tuple(shape), 0, 4) for name, shape in shapes.items()}
    with contextlib.suppress(InvalidAdapter):
        spec = parse(tensors)
        assert Bottleneck().shapes(spec, BASE) == {name: info.shape for name, info in tensors.items()}
