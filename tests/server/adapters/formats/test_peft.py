import json
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from peft import (
    BeftConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from server.adapters.formats.peft import COMMON_DROPPED, MAX_BYTES, TYPES, method_of, read_config
from server.errors import InvalidAdapter, TooLarge

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
NEEDED: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4, "lora_alpha": 8},
    "BITFIT": {"bias_mode": "delta"},
    **{kind: {"num_virtual_tokens": 4} for kind in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")},
}


def read(**fields: Any) -> dict[str, Any]:
    return read_config(json.dumps(GOOD | fields).encode())


def test_everything_peft_writes_by_default_is_known() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    ).to_dict()
    written = json.loads(json.dumps(config, default=list))
    assert read_config(json.dumps(written).encode()) == read()
    assert method_of(read()) == "lora"


COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "inference_mode": True}
OTHERS = [
    (PrefixTuningConfig(num_virtual_tokens=5, **COMMON), "prefix"),
    (
        PrefixTuningConfig(num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=8, **COMMON),
        "prefix",
    ),
    (PromptTuningConfig(num_virtual_tokens=5, **COMMON), "prompt"),
    (
        PromptTuningConfig(
            num_virtual_tokens=5,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="Classify:",
            tokenizer_name_or_path="gpt2",
            tokenizer_kwargs={"use_fast": True},
            **COMMON,
        ),
        "prompt",
    ),
    (PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=8, **COMMON), "prompt"),
    (BeftConfig(target_modules=["v_proj"], **COMMON), "bitfit"),
    (IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], **COMMON), "ia3"),
    (LNTuningConfig(target_modules=["input_layernorm"], **COMMON), "ln_tuning"),
]


@pytest.mark.parametrize(("config", "method"), OTHERS, ids=lambda value: getattr(value, "peft_type", value))
def test_the_other_types_peft_writes_are_known(config: PeftConfig, method: str) -> None:
    written = config.to_dict() | {"peft_version": "0.21.2", "auto_mapping": None}
    if hasattr(config, "num_virtual_tokens"):
        written |= {
            "token_dim": 8,
            "num_layers": 2,
            "num_attention_heads": 2,
            "num_transformer_submodules": 1,
        }
    kept = read_config(json.dumps(written, default=list).encode())
    assert method_of(kept) == method
    assert read_config(json.dumps(kept).encode()) == kept, "what was kept can be read again"
    with pytest.raises(InvalidAdapter, match="surprise"):
        read_config(json.dumps(kept | {"surprise": 1}).encode())


def test_equal_adapters_give_equal_configs() -> None:
    other = read(
        target_modules=["q_proj", "v_proj", "q_proj"], inference_mode=True, peft_version="0.9", revision="x"
    )
    assert other == read()
    assert read_config(json.dumps(other).encode()) == other, "what was kept can be read again"


def test_the_order_of_patterns_is_kept() -> None:
    """The first key that matches decides, so {a, b} and {b, a} are two adapters, sorted JSON or not."""
    kept = read(alpha_pattern={"q_proj": 1, "0.q_proj": 2})["alpha_pattern"]
    assert [list(pair) for pair in kept] == [["q_proj", 1], ["0.q_proj", 2]]


REFUSED: dict[str, list[Any]] = {
    "peft_type": ["ADALORA", "lora", None, 1, ["LORA"], {}],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 1, []],
    "bias": ["some", "", None, True],
    "task_type": ["SEQ_CLS", 1],
    "layer_replication": [[[0, 4], [2, 5]]],
    "target_parameters": [["mlp.experts"]],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [1]}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "arrow_config": [{"top_k": 3}],
    "kasa_config": [{"beta": 1e-4}],
    "target_modules": [1, [1], [None], {"a": 1}, True],
    "exclude_modules": [3, [["q"]]],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in REFUSED.items() for v in values])
def test_what_is_not_served_is_refused_by_the_fields_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        read(**{field: value})
    assert caught.value.param == field
    assert field in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", -1),
        ("r", 1.5),
        ("r", "4"),
        ("r", True),
        ("r", None),
        ("r", 1 << 70),
        ("lora_alpha", "8"),
        ("lora_alpha", 1e300),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("use_dora", 1),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"q": "4"}),
        ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": None}),
        ("alpha_pattern", 3),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", ["../x"]),
        ("layers_to_transform", ["x"]),
    ],
)
def test_wrong_types_and_ranges_are_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidAdapter, match=field) as caught:
        read(**{field: value})
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff",
        b'{"r": 1, "r": 2}',
        b'{"peft_type": "LORA", "r": NaN}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"peft_type": "LORA", "revision": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"\xef\xbb\xbf\xef\xbb\xbf{}",
    ],
)
def test_bad_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        read_config(data)


def test_overlong_files_and_missing_fields_are_refused() -> None:
    with pytest.raises(TooLarge, match=str(MAX_BYTES)):
        read_config(b"{}".ljust(MAX_BYTES + 1))
    with pytest.raises(InvalidAdapter, match="r"):
        read_config(b'{"peft_type": "LORA", "lora_alpha": 8}')


TAKEN: dict[str, list[Any]] = {
    # which modules they name, the tensors say; nothing of them is run
    "target_modules": [
        "q_proj",
        "all-linear",
        ".*q_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.q_proj)",
        "(a+)+$",
        "(",
        "x" * 100_000,
    ],
    "exclude_modules": [".*", "(x+x+)+y", "q_proj", ""],
    # the settings of an init that is over, and of what runs no adapter's math
    "corda_config": [{"corda_method": "kpm"}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "loftq_config": [{}, {"loftq_bits": 4}],
    "eva_config": [{"rho": 2.0}],
    "megatron_config": [{"a": {"b": 1}}],
    "megatron_core": ["megatron.core"],
    "init_lora_weights": [True, False, None, "gaussian", "orthogonal", "eva", "mica"],
    "runtime_config": [None, {"ephemeral_gpu_offload": False}],
    # labels
    "base_model_name_or_path": ["http://127.0.0.1/x", "s3://bucket/x", "x" * 2000, {"a": {"b": 1}}],
    "revision": ["file:///etc/passwd", ["http://x"]],
    "auto_mapping": [{"parent_library": "https://x"}, {"a": ["x"]}],
    "task_type": [None, "CAUSAL_LM", "FEATURE_EXTRACTION"],
    "layers_pattern": ["(x+)+"],
    # what asks for nothing
    "use_dora": [None, False],
    "use_rslora": [None],
    "lora_bias": [None],
    "ensure_weight_tying": [None, False],
    "rank_pattern": [None, {}],
    "use_bdlora": [None, False],
    "a_field_of_tomorrow": [None, False, "", [], {}],
    "use_original_init": [False],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in TAKEN.items() for v in values])
def test_what_changes_no_output_is_dropped(field: str, value: Any) -> None:
    expected = read(**{field: None}) if field in ("target_modules", "exclude_modules") else read()
    assert read(**{field: value}) == expected


def test_what_virtual_tokens_were_made_from_is_dropped() -> None:
    own = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    text = {"prompt_tuning_init_text": "See https://x.org. " * 500, "tokenizer_name_or_path": "s3://b/x"}
    assert read_config(json.dumps(own | text).encode()) == read_config(json.dumps(own).encode())


def test_a_name_that_no_module_can_have_names_none() -> None:
    assert read(target_modules=["v_proj", ".*k_proj$", "a/b", "q\n", "q_proj", "x" * 300]) == read()


def test_the_settings_of_an_init_do_not_hide_that_it_changed_the_base() -> None:
    with pytest.raises(InvalidAdapter, match=r"base's weights.*path_initial_model_for_weight_conversion"):
        read(init_lora_weights="corda", corda_config={"corda_method": "kpm"})


def test_an_unknown_field_that_asks_for_something_is_refused() -> None:
    values: list[Any] = [True, 0, 1, 0.0, "x", [None], [[]], {"a": None}]
    for value in values:
        with pytest.raises(InvalidAdapter, match="a_field_of_tomorrow") as caught:
            read(a_field_of_tomorrow=value)
        assert caught.value.param == "adapter_config.json"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("kind", TYPES)
@given(name=st.text(min_size=1), value=json_values)
def test_unknown_fields_are_dropped_if_and_only_if_they_ask_for_nothing(
    kind: str, name: str, value: Any
) -> None:
    """Of every type: one rule, in one place."""
    _, fields = TYPES[kind]
    own: dict[str, Any] = {"peft_type": kind} | NEEDED.get(kind, {})
    assume(name not in {*fields.kept.__struct_fields__, *fields.dropped, *COMMON_DROPPED, "task_type"})
    assume(name not in {*fields.one_of, *fields.empty})
    sent = msgspec.json.encode(own | {name: value})
    if value is None or value is False or value == "" or value == [] or value == {}:
        assert read_config(sent) == read_config(msgspec.json.encode(own))
    else:
        with pytest.raises(InvalidAdapter) as caught:
            read_config(sent)
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 400


def test_a_config_of_mlx_lm_is_told_by_name() -> None:
    mlx = {"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8, "scale": 20.0}}
    with pytest.raises(InvalidAdapter, match=r"mlx-lm.*Convert"):
        read_config(json.dumps(mlx).encode())


def test_a_byte_order_mark_is_skipped() -> None:
    assert read_config(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()) == read()


@pytest.mark.parametrize("text", ["\ud800", "q_proj\udfff"])
@pytest.mark.parametrize("fields", ["rank_pattern", "revision", "bias"])
def test_half_a_character_is_refused_wherever_it_stands(fields: str, text: str) -> None:
    for value in (text, {text: 2}, [text]):
        with pytest.raises(InvalidAdapter, match="not UTF-8"):
            read(**{fields: value})


def test_a_refusal_quotes_little_of_a_long_value() -> None:
    data = json.dumps({"peft_type": "BITFIT", "bias_mode": "\0x" * 20_000})
    with pytest.raises(InvalidAdapter, match=r"bias_mode`\.$") as caught:
        read_config(data.encode())
    assert len(caught.value.message) < 300
    assert caught.value.message.isprintable()
