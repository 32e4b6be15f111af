"""vLLM's dynamic-LoRA routes, for the operator: publish an adapter from a folder under `lora_folder`.

The adapter belongs to the operator, as an upload with the operator's key does. Off without
`lora_folder`.
"""

from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import PlainTextResponse

from server.api.adapters.publish import AdapterUpload, publish
from server.api.adapters.upload_form import CONFIG, WEIGHTS
from server.api.http.body_model import Body
from server.api.http.dependencies import OPERATOR, Actor, CurrentChange, Deps, operator
from server.api.http.json_body import json_body
from server.api.routes.adapters.adapters import delete
from server.errors import InvalidAdapter, InvalidField, NotFound, shown

router = APIRouter(prefix="/v1", dependencies=[Depends(operator)])


class LoadBody(Body):
    lora_name: str
    lora_path: str
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadBody(Body):
    lora_name: str
    lora_int_id: int | None = None


@router.post("/load_lora_adapter", response_class=PlainTextResponse)
async def load(
    deps: Deps,
    actor: Actor,
    change: CurrentChange,
    body: Annotated[LoadBody, Depends(json_body(LoadBody))],
) -> Response:
    """With `load_inplace` an existing adapter gets a new version; without it that is a conflict."""
    change.of(body.lora_name)
    if deps.settings.lora_folder is None:
        raise NotFound("Loading from paths is off: the operator has set no lora_folder.")
    folder = _inside(deps.settings.lora_folder, body.lora_path)
    weights = [name for name in WEIGHTS if (folder / name).is_file()]
    if not weights or not (folder / CONFIG).is_file():
        raise InvalidAdapter(f"lora_path must hold {CONFIG} and {' or '.join(WEIGHTS)}.", param="lora_path")
    files = AdapterUpload((CONFIG, folder / CONFIG), (weights[0], folder / weights[0]))
    await publish(deps, OPERATOR, body.lora_name, files, create_only=not body.load_inplace, actor=actor)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/unload_lora_adapter", response_class=PlainTextResponse)
async def unload(
    deps: Deps,
    actor: Actor,
    change: CurrentChange,
    body: Annotated[UnloadBody, Depends(json_body(UnloadBody))],
) -> Response:
    change.of(body.lora_name)
    await delete(deps, OPERATOR.id, body.lora_name, None, actor)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _inside(root: Path, lora_path: str) -> Path:
    """The folder, relative to `root` or absolute. Raises InvalidField if it resolves to another place."""
    refusal = InvalidField(
        f"lora_path {shown(lora_path)} is not in the configured folder.", param="lora_path"
    )
    if "\0" in lora_path:
        raise refusal
    path = (root / lora_path).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_dir():
        raise refusal
    return path
