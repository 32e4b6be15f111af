"""instructor: by JSON schema, and by tools, its default."""

import instructor
import openai
from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
ASK = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    city: str = Field(max_length=20)
    big: bool


def extracted(mode, model=MODEL):
    maker = instructor.from_openai(client, mode=mode)
    return maker.chat.completions.create(
        model=model, messages=ASK, response_model=City, max_retries=1, max_tokens=200
    )


@feature("adapter")
def _():
    return extracted(instructor.Mode.JSON_SCHEMA, ADAPTER)


@feature("structured output")
def _():
    return extracted(instructor.Mode.JSON_SCHEMA)


@feature("tools")
def _():
    return extracted(instructor.Mode.TOOLS)
