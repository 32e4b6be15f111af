"""DSPy's LM."""

import dspy
from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, SCHEMA, feature


def lm(model=MODEL, **fields):
    return dspy.LM(f"openai/{model}", api_base=BASE_URL, api_key=KEY, cache=False, max_tokens=60, **fields)


@feature("chat")
def _():
    return lm()(QUESTION)


@feature("adapter")
def _():
    return lm(ADAPTER)(QUESTION)


@feature("structured output")
def _():
    format_ = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    return lm()(QUESTION, response_format=format_)


@feature("completions")
def _():
    return lm(model_type="text")("Once")


@feature("responses")
def _():
    return lm(model_type="responses")(QUESTION)
