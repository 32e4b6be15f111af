"""LlamaIndex's OpenAILike."""

from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def llm(model=MODEL, **fields):
    options = {"is_chat_model": True, "context_window": 2048, "max_tokens": 60, "max_retries": 0} | fields
    return OpenAILike(model=model, api_base=BASE_URL, api_key=KEY, **options)


class City(BaseModel):
    """A city."""

    city: str


ASK = [ChatMessage(role="user", content=QUESTION)]


@feature("chat")
def _():
    return llm().chat(ASK).message.content


@feature("adapter")
def _():
    return llm(ADAPTER).complete(QUESTION).text is not None


@feature("stream")
def _():
    return "".join(piece.delta or "" for piece in llm().stream_chat(ASK))


@feature("structured output")
def _():
    return llm(should_use_structured_outputs=True).as_structured_llm(City).chat(ASK).raw


@feature("tools")
def _():
    model = llm(is_function_calling_model=True)
    program = FunctionCallingProgram.from_defaults(City, prompt_template_str=QUESTION, llm=model)
    return program()


@feature("completions")
def _():
    return llm(is_chat_model=False).complete(QUESTION).text is not None
