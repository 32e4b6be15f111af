"""The formats in which models write function calls: a file each, and the table of all.

A format of these pieces (interface.py) is a file here, a line in TOOL_FORMATS and its name in
`Settings.tool_format`. Rendering, grammar and parser follow from the pieces.
"""

from server.base_model.tool_formats.hermes import HERMES
from server.base_model.tool_formats.interface import NAME, ToolFormat
from server.base_model.tool_formats.llama3 import LLAMA3
from server.base_model.tool_formats.mistral import MISTRAL, MISTRAL_ARGS
from server.base_model.tool_formats.plain_json import PLAIN_JSON

__all__ = ["HERMES", "NAME", "TOOL_FORMATS", "ToolFormat", "format_of"]

TOOL_FORMATS = {format_.name: format_ for format_ in (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, PLAIN_JSON)}


def format_of(template: str) -> ToolFormat | None:
    """The format that a chat template, by its source, writes calls in; None if it is none of these."""
    return next((format_ for format_ in TOOL_FORMATS.values() if format_.fits(template)), None)
