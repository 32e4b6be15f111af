"""pydantic-ai: text, native output, and its default, which is a tool."""

import asyncio

from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=BASE_URL, api_key=KEY)


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=20)
    big: bool


def agent(model=MODEL, **fields):
    return Agent(OpenAIChatModel(model, provider=provider), model_settings={"max_tokens": 60}, **fields)


@feature("chat")
def _():
    return agent().run_sync(QUESTION).output


@feature("adapter")
def _():
    return agent(ADAPTER).run_sync(QUESTION).usage is not None


@feature("stream")
def _():
    async def joined():
        async with agent().run_stream(QUESTION) as answer:
            return [text async for text in answer.stream_text(delta=True)]

    return asyncio.run(joined())


@feature("structured output")
def _():
    return agent(output_type=NativeOutput(City)).run_sync(QUESTION).output


@feature("tools")
def _():
    return agent(output_type=City).run_sync(QUESTION).output
