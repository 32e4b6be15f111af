"""The JSON schema that response_format asks for, as text for the engine."""

from typing import Any

from server.api.structured_output.compilation import Source, compile_all, schema_text
from server.api.structured_output.structured_outputs import ResponseFormat

PLACE = "response_format"
ANY_OBJECT = '{"type":"object"}'


async def schema_of(response_format: ResponseFormat | None) -> str | None:
    """The schema text for Sampling.grammar; None for plain text. Raises InvalidField."""
    if response_format is None or response_format.type == "text":
        return None
    if response_format.json_schema is not None:
        source = Source(f"{PLACE}: json_schema.schema", PLACE)
        return await compiled_schema(response_format.json_schema.schema_, source)
    if response_format.schema_ is not None:
        source = Source(f"{PLACE}: schema", PLACE)
        return await compiled_schema({"type": "object"} | response_format.schema_, source)
    return ANY_OBJECT


async def compiled_schema(schema: dict[str, Any], source: Source) -> str:
    """The schema text, once it is known to compile. Raises InvalidField."""
    text = schema_text(schema, source)
    await compile_all([(text, source)])
    return text
