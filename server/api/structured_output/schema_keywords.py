"""The keywords of a tenant's JSON schema, told from names and data."""

from collections.abc import Iterator
from typing import Any

# keywords whose objects have names as keys, and schemas as values
NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
DATA = frozenset({"enum", "const", "default", "examples"})  # keywords whose values are data
# Formats that are enforced. Any other is an annotation, as JSON Schema says, and pydantic writes many.
FORMATS = frozenset(
    ["date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
)


def keywords(schema: Any) -> Iterator[str]:
    """Every key of the schema in the place of a keyword."""
    if isinstance(schema, list):
        for item in schema:
            yield from keywords(item)
    elif isinstance(schema, dict):
        for key, value in schema.items():
            yield key
            if key in NAMED_SCHEMAS and isinstance(value, dict):
                yield from keywords(list(value.values()))
            elif key not in DATA:
                yield from keywords(value)


def without_annotations(schema: Any) -> Any:
    """`schema` without formats that nobody enforces."""
    if isinstance(schema, list):
        return [without_annotations(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _value(key, value)
        for key, value in schema.items()
        if key != "format" or not isinstance(value, str) or value in FORMATS
    }


def _value(key: str, value: Any) -> Any:
    if key in DATA:
        return value
    if key in NAMED_SCHEMAS and isinstance(value, dict):
        return {name: without_annotations(each) for name, each in value.items()}
    return without_annotations(value)
