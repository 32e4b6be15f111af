"""/docs: the OpenAPI document as one page of HTML, without a script, and without a request to elsewhere."""

import json
from html import escape
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
summary { cursor: pointer; padding: .3rem 0 } pre { overflow: auto; background: #8881; padding: .6rem }
code { font-size: 90% } .method { display: inline-block; width: 4.5rem; font-weight: 600 }
table { border-collapse: collapse } td { padding: .15rem .8rem .15rem 0; vertical-align: top }
:root { color-scheme: light dark }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(document: dict[str, Any]) -> str:
    """The page of `document`."""
    operations = "".join(
        _operation(method, path, operation, document["components"]["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    )
    schemas = "".join(
        f'<details id="{name}"><summary><code>{name}</code></summary>{_json(schema)}</details>'
        for name, schema in document["components"]["schemas"].items()
    )
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f'<h1>{title}</h1><p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<h2>Routes</h2>{operations}<h2>Objects</h2>{schemas}</html>"
    )


def _operation(method: str, path: str, operation: dict[str, Any], errors: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {})
    sections = [f"<p>{escape(operation.get('description', ''))}</p>"]
    if not operation["security"]:
        sections.append("<p>Takes no key.</p>")
    sections.append(_table(_parameter(each) for each in operation.get("parameters", [])))
    sections += [f"<p>Body: {escape(kind)}</p>{_schema(of['schema'])}" for kind, of in body.items()]
    answers = {
        status: errors[answer["$ref"].rpartition("/")[2]] if "$ref" in answer else answer
        for status, answer in operation["responses"].items()
    }
    sections.append(_table(_response(*each) for each in answers.items()))
    heading = f'<span class="method">{method.upper()}</span> <code>{escape(path)}</code>'
    return f"<details><summary>{heading}</summary>{''.join(sections)}</details>"


def _parameter(parameter: dict[str, Any]) -> list[str]:
    return [
        f"<code>{escape(parameter['name'])}</code>",
        escape(parameter["in"]),
        _schema(parameter["schema"]),
    ]


def _response(status: str, response: dict[str, Any]) -> list[str]:
    kinds = "".join(
        f"<div>{escape(kind)} {_schema(of.get('schema', {}))}</div>"
        for kind, of in response.get("content", {}).items()
    )
    headers = ", ".join(f"<code>{escape(name)}</code>" for name in response.get("headers", {}))
    return [status, f"{escape(response['description'])}<div>{headers}</div>{kinds}"]


def _table(rows: Any) -> str:
    lines = ("".join(f"<td>{cell}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _schema(schema: dict[str, Any]) -> str:
    reference = schema.get("$ref")
    if reference is None:
        return _json(schema) if len(schema) > 3 else f"<code>{escape(json.dumps(schema))}</code>"
    name = escape(reference.rpartition("/")[2])
    return f'<a href="#{name}"><code>{name}</code></a>'


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2))}</pre>"
