import json
from pathlib import Path
from typing import Any

import pytest

from server.adapters.formats.detect import MAX_BYTES, method_of, read_config
from server.errors import InvalidAdapter, TooLarge

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "adapterhub"
WRITTEN = sorted(GOLDEN.glob("*/*/adapter_config.json"))
KEPT: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "reduction_factor": 8.0,
    "non_linearity": "relu",
    "original_ln_before": True,
    "original_ln_after": True,
    "residual_before_ln": True,
    "is_parallel": False,
    "scaling": 1.0,
    "leave_out": [],
}
SEQ_BN: dict[str, Any] = json.loads((GOLDEN / "llama" / "seq_bn" / "adapter_config.json").read_text())


def read(top: dict[str, Any] | None = None, **inner: Any) -> dict[str, Any]:
    config = SEQ_BN | {"config": SEQ_BN["config"] | inner} | (top or {})
    return read_config(json.dumps(config).encode())


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_everything_the_library_writes_is_known(path: Path) -> None:
    kept = read_config(path.read_bytes())
    assert method_of(kept) == "bottleneck"
    assert read_config(json.dumps(kept).encode()) == kept, "what was kept can be read again"


def test_only_what_matters_is_kept() -> None:
    assert read() == {"model_type": "llama", "version": "adapters", "config": KEPT}
    same = read(
        {"name": "other", "version": "adapters.2.0.0", "model_name": "/a/path", "hidden_size": 7},
        init_weights="houlsby",
        dropout=0.5,
        reduction_factor=8,
        leave_out=None,
    )
    assert same == read()
    assert read(leave_out=[3, 1, 3])["config"]["leave_out"] == [1, 3]
    assert read(non_linearity="swish") == read(non_linearity="SiLU")


def test_without_a_version_two_names_mean_something_else() -> None:
    old = {name: value for name, value in SEQ_BN.items() if name != "version"}
    for written, meant in {"gelu": "gelu_new", "gelu_orig": "gelu", "relu": "relu"}.items():
        config = old | {"config": SEQ_BN["config"] | {"non_linearity": written}}
        found = read_config(json.dumps(config).encode())
        assert found == read(non_linearity=meant)
        assert read_config(json.dumps(found).encode()) == found, "renamed once, not twice"
    assert read(non_linearity="gelu")["config"]["non_linearity"] == "gelu"


REFUSED: dict[str, list[Any]] = {
    "architecture": ["lora", "union", "prefix_tuning", "reft", 1, {"a": 1}],
    "phm_layer": [True, "true", 1.5],
    "inv_adapter": ["nice", "glow"],
    "invertible_adapter": [{"block_type": "nice"}],
    "use_gating": [True],
    "ln_before": [True],
    "ln_after": [True],
    "cross_adapter": [True],
    "leave_out": [1, "0", [0.5], ["0"], [True], [[0]], {"0": 1}],
    "original_ln_after": [False],
    "output_adapter": [False],
}
MALFORMED: dict[str, list[Any]] = {
    "non_linearity": ["sigmoid", "prelu", "gelu_orig", "__import__", "", None, 1, ["relu"], {"a": 1}],
    "reduction_factor": [0, -1, 1e-4, 1e9, True, "16", None, [16], {"0": 0}, {"-1": 2}, {"01": 2}, {"a": 2}],
    "scaling": ["gated", None, True, 1e9, [1.0], {"a": 1}],
    "leave_out": [[-1], [10_000]],
    "mh_adapter": [1, "true", []],
    "output_adapter": [1],
    "is_parallel": [1, "false"],
    "original_ln_before": [0],
    "residual_before_ln": ["post_add"],
}


def test_null_is_false_and_labels_are_dropped_whatever_they_say() -> None:
    for field, value in SEQ_BN["config"].items():
        if value is False:
            assert read(**{field: None}) == read()
    with pytest.raises(InvalidAdapter, match="output_adapter"):
        read(output_adapter=None)
    for label in ("http://127.0.0.1/x", "x" * 2000, [[1]], {"a": {"b": 1}}):
        assert read({"name": label, "model_name": label}, dropout=label, init_weights=label) == read()


def test_unknown_fields_are_dropped_while_they_ask_for_nothing() -> None:
    nothings: list[Any] = [None, False, "", [], {}]
    for nothing in nothings:
        assert read({"unknown": nothing}, unknown=nothing, use_gating=nothing) == read()
    somethings: list[Any] = [True, 0, "x", [None], {"a": None}]
    for something in somethings:
        with pytest.raises(InvalidAdapter, match="'unknown'"):
            read({"unknown": something})
        with pytest.raises(InvalidAdapter, match="'unknown'"):
            read(unknown=something)


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_served_is_refused_by_its_field(field: str) -> None:
    for value in REFUSED[field]:
        with pytest.raises(InvalidAdapter) as caught:
            read(**{field: value})
        assert caught.value.param == field
        assert len(caught.value.message) < 300


@pytest.mark.parametrize("field", MALFORMED)
def test_what_is_malformed_is_refused(field: str) -> None:
    for value in MALFORMED[field]:
        with pytest.raises(InvalidAdapter) as caught:
            read(**{field: value})
        assert len(caught.value.message) < 300


def test_the_residual_stream_is_added_once() -> None:
    read(original_ln_after=False, residual_before_ln=False)
    read(original_ln_before=False, residual_before_ln=False)
    read(is_parallel=True, original_ln_before=False)
    wrong: list[dict[str, Any]] = [
        {"residual_before_ln": False},
        {"original_ln_after": False, "is_parallel": True},
        {"original_ln_after": False, "residual_before_ln": False, "original_ln_before": False},
    ]
    for fields in wrong:
        with pytest.raises(InvalidAdapter, match="twice or never"):
            read(**fields)


def test_whose_config_it_is() -> None:
    with pytest.raises(InvalidAdapter, match="peft_type"):
        read({"peft_type": "IA4"})
    for missing in ("config", "model_type"):
        config = {name: value for name, value in SEQ_BN.items() if name != missing}
        with pytest.raises(InvalidAdapter):
            read_config(json.dumps(config).encode())
    names: list[Any] = ["pfeiffer", None, [], 1]
    for named in names:
        with pytest.raises(InvalidAdapter):
            read({"config": named})
    tops: list[dict[str, Any]] = [
        {"unknown": 1},
        {"model_type": 5},
    ]
    for top in tops:
        with pytest.raises(InvalidAdapter):
            read(top)
    with pytest.raises(TooLarge):
        read_config(b"{}".ljust(MAX_BYTES + 1))
    assert method_of(read_config(b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')) == "lora"
