import json
from pathlib import Path

import pytest

from server.adapters.formats.adapterhub import MAX_INTERFACE_BYTES, check_interface
from server.errors import InvalidAdapter, TooLarge

GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "adapterhub"
WRITTEN = sorted(GOLDEN.glob("*/*/adapter_interface.json"))
GEMMA2 = json.loads((GOLDEN / "gemma2" / "seq_bn" / "adapter_interface.json").read_text())


def test_what_the_library_ships_is_what_we_serve() -> None:
    assert {path.parent.parent.name for path in WRITTEN} == {"qwen2", "qwen3", "gemma2"}
    for path in WRITTEN:
        check_interface(path.read_bytes(), path.parent.parent.name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layer_pre_ffn", None),
        ("layer_pre_ffn", "post_attention_layernorm"),
        ("layer_ln_2", None),
        ("layer_output_proj", "mlp.up_proj"),
        ("attn_o_proj", ["o_proj"]),
        ("layer_self_attn", "x" * 10_000),
    ],
)
def test_hooks_elsewhere_are_refused(field: str, value: object) -> None:
    changed = GEMMA2 | {"interface": GEMMA2["interface"] | {field: value}}
    with pytest.raises(InvalidAdapter) as caught:
        check_interface(json.dumps(changed).encode(), "gemma2")
    assert caught.value.param == field
    assert len(caught.value.message) < 300


def test_other_files_are_refused() -> None:
    for data in (b"", b"[]", b"{}", json.dumps(GEMMA2 | {"interface": []}).encode()):
        with pytest.raises(InvalidAdapter):
            check_interface(data, "gemma2")
    with pytest.raises(InvalidAdapter, match="not one for a qwen2"):
        check_interface(json.dumps(GEMMA2).encode(), "qwen2")
    with pytest.raises(TooLarge):
        check_interface(b"{}".ljust(MAX_INTERFACE_BYTES + 1), "gemma2")
