"""Random JSON schemas of a function's arguments, whose values are bounded: any model comes to their end."""

import random
from collections.abc import Callable
from typing import Any

WORDS = ["city", "unit", "count", "when", "ok", "path", "tags", "x", "query_2", "größe"]


def random_schema(seed: int) -> dict[str, Any]:
    """An object schema, perhaps with definitions, alternatives and patterns."""
    rng = random.Random(seed)
    schema = _object(rng, depth=2)
    if rng.random() < 0.3:
        schema["$defs"] = {"leaf": _value(rng, 0)}
        schema["properties"]["ref"] = {"$ref": "#/$defs/leaf"}
        schema["required"] = [*schema["required"], "ref"]
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(0, 3))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    leaves: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": rng.randint(0, 8)},
        lambda: {"type": "string", "enum": rng.sample(WORDS, 3)},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-z]{2}$", "^[0-9]{3}-x?$", "^(ab|c){1,2}$"])},
        lambda: {"type": "string", "format": rng.choice(["date", "time", "ipv4", "uuid"])},
        lambda: {"type": "integer", "minimum": -5, "maximum": rng.randint(0, 300)},
        lambda: {"type": "boolean"},
        lambda: {"type": "null"},
        lambda: {"const": rng.choice([1, "one", None, True])},
        lambda: {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        lambda: {"anyOf": [{"type": "boolean"}, {"type": "string", "maxLength": 2}]},
    ]
    if depth > 0 and rng.random() < 0.5:
        if rng.random() < 0.5:
            return _object(rng, depth)
        return {
            "type": "array",
            "items": _value(rng, depth - 1),
            "maxItems": 2,
            "minItems": rng.randint(0, 2),
        }
    return rng.choice(leaves)()
