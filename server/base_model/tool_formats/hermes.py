"""Hermes, Qwen 2.5, Qwen 3, Granite 4, SmolLM: a JSON object between tags for each call.

Templates with the same tags around another notation (Qwen3-Coder, GLM) are not of this format.
"""

from server.base_model.tool_formats.interface import ToolFormat

HERMES = ToolFormat(
    name="hermes",
    before="<tool_call>\n",
    head='{"name": "NAME", "arguments": ',
    tail="}",
    after="\n</tool_call>",
    separator="\n",
    markers=("<tool_call>", "</tool_call>"),
    begin="<tool_call>",
    in_template=("<tool_call>",),
    not_in_template=("<function=", "<arg_key>"),
)
