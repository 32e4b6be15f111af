"""Plain JSON: the whole answer is a JSON object. For models that were trained on no markers."""

from server.base_model.tool_formats.interface import ToolFormat

PLAIN_JSON = ToolFormat(
    name="json", head='{"name": "NAME", "arguments": ', tail="}", separator="\n", bare=True
)
