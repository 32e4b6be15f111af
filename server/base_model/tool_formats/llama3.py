"""Llama 3.1 and 3.2: the whole answer is a JSON object with `parameters`, perhaps after a control token."""

from server.base_model.tool_formats.interface import ToolFormat

LLAMA3 = ToolFormat(
    name="llama3",
    head='{"name": "NAME", "parameters": ',
    tail="}",
    separator="; ",
    markers=("<|python_tag|>",),
    begin="<|python_tag|>",
    bare=True,
    in_template=('"parameters": ', "<|start_header_id|>", "ipython"),
)
