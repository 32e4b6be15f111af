"""openai-agents: by chat completions, and by Responses, its default."""

import asyncio

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(True)


class City(BaseModel):
    city: str


@function_tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def ask(model=MODEL, kind=OpenAIChatCompletionsModel, **fields):
    async def run():
        client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
        settings = fields.pop("settings", ModelSettings(max_tokens=60))
        agent = Agent("a", model=kind(model, client), model_settings=settings, **fields)
        return await Runner.run(agent, QUESTION, max_turns=3)

    return asyncio.run(run())


@feature("chat")
def _():
    return ask().final_output


@feature("adapter")
def _():
    return ask(ADAPTER).raw_responses[0].usage.output_tokens


@feature("stream")
def _():
    async def run():
        client = AsyncOpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0)
        model = OpenAIChatCompletionsModel(MODEL, client)
        agent = Agent("a", model=model, model_settings=ModelSettings(max_tokens=60))
        return [event async for event in Runner.run_streamed(agent, QUESTION).stream_events()]

    return asyncio.run(run())


@feature("structured output")
def _():
    return ask(output_type=City).final_output


@feature("tools")
def _():
    first = ModelSettings(max_tokens=60, tool_choice="required")
    return ask(tools=[weather], settings=first).final_output is not None


@feature("responses")
def _():
    return ask(kind=OpenAIResponsesModel).final_output
