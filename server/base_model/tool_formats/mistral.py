"""Mistral: a control token, then a JSON list (tokenizers up to v7), or name and arguments (from v11).

Templates up to v7 take ids of exactly nine letters and digits.
"""

from server.base_model.tool_formats.interface import ToolFormat

MISTRAL = ToolFormat(
    name="mistral",
    prefix="[TOOL_CALLS][",
    head='{"name": "NAME", "arguments": ',
    tail="}",
    separator=", ",
    suffix="]",
    markers=("[TOOL_CALLS]",),
    begin="[TOOL_CALLS]",
    in_template=("[TOOL_CALLS]",),
    not_in_template=("[ARGS]",),
    id_chars=9,
)
MISTRAL_ARGS = ToolFormat(
    name="mistral-args",
    before="[TOOL_CALLS]",
    head="NAME[ARGS]",
    markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"),
    begin="[TOOL_CALLS]",
    call_id="[CALL_ID]",
    in_template=("[TOOL_CALLS]", "[ARGS]"),
    id_chars=9,
)
