"""LangChain's ChatOpenAI at its defaults."""

from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field


def chat(model=MODEL, **fields):
    return ChatOpenAI(model=model, base_url=BASE_URL, api_key=KEY, max_retries=0, max_tokens=60, **fields)


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=20)
    big: bool


def weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


@feature("chat")
def _():
    return chat().invoke(QUESTION).content


@feature("adapter")
def _():
    return chat(ADAPTER).invoke(QUESTION).response_metadata["model_name"] == ADAPTER


@feature("stream")
def _():
    return "".join(chunk.content for chunk in chat().stream(QUESTION))


@feature("structured output")
def _():
    return chat().with_structured_output(City).invoke(QUESTION)


@feature("tools")
def _():
    return chat().bind_tools([weather], tool_choice="required").invoke(QUESTION).tool_calls


@feature("responses")
def _():
    return chat(use_responses_api=True).invoke(QUESTION).content
