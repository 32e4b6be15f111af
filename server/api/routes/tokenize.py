"""POST /tokenize and /detokenize, GET /tokenizer_info, as vLLM has them: at the root, beside /v1.

Adapters have the base's tokenizer, so `model` changes nothing; it must exist all the same.
"""

from functools import partial
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Depends, Response
from pydantic import Field, model_validator

from server.api.generation.bodies import Tokens
from server.api.generation.chat_bodies import ChatBody
from server.api.generation.engine_requests import max_context
from server.api.generation.model_selection import resolve
from server.api.generation.prompts import chat_prompt, in_vocabulary, off_loop, text_tokens
from server.api.http.body_model import Body
from server.api.http.dependencies import CurrentCaller, CurrentTenant, Deps, current_tenant
from server.api.http.error_responses import json_response
from server.api.http.json_body import json_body, validate
from server.api.tools.tool_use import tool_use
from server.errors import InvalidField

router = APIRouter(dependencies=[Depends(current_tenant)])

Model = Annotated[str, Field(min_length=1, max_length=512)]


class TokenizeBody(Body):
    """A text or a conversation. `add_special_tokens` is true by default for a text only, whose template
    does not write them.
    """

    model: Model | None = None
    prompt: str | None = None
    messages: list[Any] | None = None  # ChatBody checks them and the functions
    tools: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: Literal[False] = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidField("Send either prompt or messages.", param="prompt", code="missing_field")
        return self


class DetokenizeBody(Body):
    model: Model | None = None
    tokens: Tokens


@router.post("/tokenize")
async def tokenize(
    deps: Deps,
    tenant: CurrentTenant,
    caller: CurrentCaller,
    body: Annotated[TokenizeBody, Depends(json_body(TokenizeBody))],
) -> Response:
    """The token ids of a text or a conversation, as a generation route would take them."""
    if body.model is not None:
        await resolve(deps, tenant, body.model)
    if body.messages is not None:
        sent = {"model": deps.base.id, "messages": body.messages, "tools": body.tools}
        chat = validate(ChatBody, sent, deps.settings)
        use = tool_use(chat)
        shown = use.shown if use else None
        tokens = await chat_prompt(deps, tenant, chat.messages, shown, answer=body.add_generation_prompt)
        tokens = [*deps.tokenizer.lead, *tokens] if body.add_special_tokens else tokens
    else:
        special = body.add_special_tokens is not False
        tokens = await text_tokens(deps, tenant.id, body.prompt or "", special=special)
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": max_context(deps, caller.allowances),
            "tokens": tokens,
            "token_strs": deps.tokenizer.literals(tokens) if body.return_token_strs else None,
        }
    )


@router.post("/detokenize")
async def detokenize(
    deps: Deps,
    tenant: CurrentTenant,
    body: Annotated[DetokenizeBody, Depends(json_body(DetokenizeBody))],
) -> Response:
    """The text of token ids, special ones included."""
    if body.model is not None:
        await resolve(deps, tenant, body.model)
    tokens = in_vocabulary(body.tokens, deps.base.vocab_size, "tokens") if body.tokens else []
    work = partial(deps.tokenizer.decode, tokens, special=True)
    return json_response({"prompt": await off_loop(deps, tenant.id, len(tokens), work)})


@router.get("/tokenizer_info")
async def tokenizer_info(deps: Deps) -> Response:
    """The tokenizer's class, special tokens and chat template; no paths."""
    return json_response(deps.tokenizer.info())
