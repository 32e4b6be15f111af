"""litellm's `openai/` provider."""

import litellm
from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from pydantic import BaseModel, Field

ASK = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class City(BaseModel):
    city: str = Field(max_length=20)
    big: bool


def ask(model=MODEL, **fields):
    options = {"api_base": BASE_URL, "api_key": KEY, "max_tokens": 60, "num_retries": 0} | fields
    return litellm.completion(model=f"openai/{model}", messages=ASK, **options)


@feature("chat")
def _():
    return ask(store=True, reasoning_effort="none").choices[0].message.content


@feature("adapter")
def _():
    return ask(ADAPTER).usage.completion_tokens


@feature("stream")
def _():
    return "".join(chunk.choices[0].delta.content or "" for chunk in ask(stream=True))


@feature("structured output")
def _():
    return City.model_validate_json(ask(response_format=City).choices[0].message.content)


@feature("tools")
def _():
    return ask(tools=[TOOL], tool_choice="required").choices[0].message.tool_calls


@feature("responses")
def _():
    return litellm.responses(
        model=f"openai/{MODEL}", input=QUESTION, api_base=BASE_URL, api_key=KEY, max_output_tokens=16
    ).output


@feature("completions")
def _():
    return (
        litellm.text_completion(
            model=f"text-completion-openai/{MODEL}",
            prompt="Once",
            api_base=BASE_URL,
            api_key=KEY,
            max_tokens=8,
        )
        .choices[0]
        .text
    )
