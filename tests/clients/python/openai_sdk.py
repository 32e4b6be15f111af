"""The `openai` package: what its documentation shows first."""

import openai
from feature import ADAPTER, BASE_URL, KEY, MODEL, QUESTION, feature
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0, timeout=120)
ASK = [{"role": "user", "content": QUESTION}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class City(BaseModel):
    city: str = Field(max_length=20)
    big: bool


@feature("chat")
def _():
    return client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=8).choices[0].message.content


@feature("adapter")
def _():
    answer = client.chat.completions.create(model=ADAPTER, messages=ASK, max_tokens=8)
    return answer.model == ADAPTER and answer.usage.completion_tokens


@feature("stream")
def _():
    options = {"include_usage": True}
    events = list(
        client.chat.completions.create(
            model=MODEL, messages=ASK, max_tokens=8, stream=True, stream_options=options
        )
    )
    return events[-1].usage.completion_tokens and events[-2].choices[0].finish_reason


@feature("structured output")
def _():
    answer = client.chat.completions.parse(model=MODEL, messages=ASK, response_format=City, max_tokens=60)
    return answer.choices[0].message.parsed


@feature("tools")
def _():
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, tools=[TOOL], tool_choice="required", max_tokens=60
    )
    return answer.choices[0].message.tool_calls


@feature("responses")
def _():
    return client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=16).output_text


@feature("completions")
def _():
    return client.completions.create(model=MODEL, prompt="Once", max_tokens=8, n=2, best_of=3).choices[1].text


@feature("models")
def _():
    return {MODEL, ADAPTER} <= {model.id for model in client.models.list()}


@feature("files")
def _():
    line = b'{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n'
    life = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.jsonl", line * 10), purpose="fine-tune", expires_after=life)
    assert client.files.content(file.id).read() == line * 10
    return client.files.delete(file.id).deleted


@feature("jobs")
def _():
    line = b'{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}\n'
    file = client.files.create(file=("a.jsonl", line * 10), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="Client's job")
    assert client.fine_tuning.jobs.list_events(job.id).data
    return client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


@feature("batches")
def _():
    return client.batches.list() is not None


@feature("errors")
def _():
    try:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=3)
    except openai.BadRequestError as error:
        return error.param == "temperature"
