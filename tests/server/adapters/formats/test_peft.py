import json
from typing import Any

import pytest
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

from server.adapters.formats.peft import MAX_BYTES, method_of, read_config
from server.errors import InvalidAdapter, TooLarge

GOOD: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}


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
    "megatron_config": [{"a": 1}],
    "alora_invocation_tokens": [[1]],
    "use_qalora": [True],
    "arrow_config": [{"top_k": 3}],
    "ensure_weight_tying": [True],
    "target_modules": [".*q_proj", "(a+)+$", 1, [1], [None], {"a": 1}],
    "exclude_modules": [".*", 3],
    "base_model_name_or_path": ["http://127.0.0.1/x", "s3://bucket/x", "x" * 2000, {"a": {"b": 1}}],
    "revision": ["file:///etc/passwd", ["http://x"]],
    "auto_mapping": [{"parent_library": "https://x"}, {"a": ["x"]}],
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
        ("lora_bias", None),
        ("rank_pattern", {"q": 0}),
        ("rank_pattern", {"q": "4"}),
        ("rank_pattern", ["q"]),
        ("alpha_pattern", {"q": None}),
        ("alpha_pattern", 3),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", ["../x"]),
        ("target_modules", ["a/b"]),
        ("target_modules", ["q\n"]),
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
        b'\xef\xbb\xbf{"r":1}',
    ],
)
def test_bad_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        read_config(data)


def test_unknown_fields_and_overlong_files_are_refused() -> None:
    with pytest.raises(InvalidAdapter, match="not known"):
        read(surprise=None)
    with pytest.raises(TooLarge, match=str(MAX_BYTES)):
        read_config(b"{}".ljust(MAX_BYTES + 1))
    with pytest.raises(InvalidAdapter, match="r"):
        read_config(b'{"peft_type": "LORA", "lora_alpha": 8}')


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
