"""The `llm` command's library, with a model of its extra-openai-models.yaml."""

import os
import tempfile
from pathlib import Path

from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, SCHEMA, feature

folder = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(folder)
ENTRY = """
- {{model_id: {0}, model_name: {0}, api_base: "{1}", api_key_name: polypeft,
    supports_schema: true, supports_tools: true}}
"""
(folder / "extra-openai-models.yaml").write_text("".join(ENTRY.format(m, BASE_URL) for m in (MODEL, ADAPTER)))

import llm  # noqa: E402 - it reads the folder's name when it is imported


def ask(model=MODEL, **fields):
    return llm.get_model(model).prompt(QUESTION, key=KEY, max_tokens=60, **fields)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@feature("chat")
def _():
    return ask(stream=False).text()


@feature("adapter")
def _():
    return ask(ADAPTER).text() is not None


@feature("stream")
def _():
    return list(ask(stream=True))


@feature("structured output")
def _():
    return ask(schema=SCHEMA, stream=False).text()


@feature("tools")
def _():
    return ask(tools=[weather], stream=False).text() is not None
