"""What `polypeft size` says against what an engine holds, to the byte, for every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adapters_store.object_store.store import Objects
from server.engine.engine import Engine
from server.engine.model.config_shapes import read_shapes
from server.engine.model.linear_sites import LinearSite
from server.engine.model.memory_estimate import (
    Deployment,
    Shapes,
    adapter_bytes,
    block_bytes,
    estimate_memory,
    token_bytes,
)
from server.messages import Generate, Sampling
from server.settings import Settings
from tests.fixtures.engine import publish, run
from tests.fixtures.models import FAMILIES, load_model, make_lora

SEQS, CONTEXT, SLOTS = 3, 100, 2


def held_by(site: LinearSite) -> tuple[torch.Tensor, ...]:
    return site.packed.parts if site.packed else (site.plain_weight,)


def held_bytes(engine: Engine) -> int:
    """Every byte of the base's weights, storages that are shared once."""
    model = engine.model
    tensors = [
        *model.model.parameters(),
        *(t for s in model.sites.values() if isinstance(s, LinearSite) for t in held_by(s)),
    ]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def kv_bytes(engine: Engine) -> int:
    pages = engine.model.step.pages
    return sum(page.nbytes for page in (*pages.keys, *pages.values))


def plan(dtype: str = "float32", rank: int = 4) -> Deployment:
    return Deployment(
        dtype, True, seqs=SEQS, context=CONTEXT, batch_tokens=64, adapters=5, slots=SLOTS, rank=rank
    )


def said(shapes: Shapes, what: str, dtype: str = "float32") -> int:
    return next(part.bytes for part in estimate_memory(shapes, plan(dtype)) if part.what == what)


def engine_of(model: Path, folder: Path, dtype: str, kv: int) -> Engine:
    told = {"data_dir": folder, "model": str(model), "threads": 1, "dtype": dtype}
    return Engine(Settings.model_validate(told | {"kv_bytes": max(kv, 1 << 20)}), model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_kv_are_what_the_engine_holds(
    tiny_models: Callable[[str], Path], tmp_path: Path, family: str, dtype: str
) -> None:
    model = tiny_models(family)
    shapes = read_shapes(model)
    kv = said(shapes, "KV cache", dtype)
    engine = engine_of(model, tmp_path, dtype, kv)
    assert said(shapes, "weights", dtype) == held_bytes(engine)
    held = kv_bytes(engine)
    assert held == engine.blocks.count * block_bytes(shapes.base, dtype)
    assert kv == SEQS * -(-CONTEXT // 16) * block_bytes(shapes.base, dtype)
    assert kv <= held or kv < 1 << 20
    engine.close()


def test_the_default_base_to_the_byte(smollm2: Path, tmp_path: Path) -> None:
    """30 layers, 3 heads of 64 for K and V: 46,080 bytes a token; rank 16 on all linears: 19.5 MB."""
    shapes = read_shapes(smollm2)
    assert token_bytes(shapes.base, "float32") == 2 * 30 * 3 * 64 * 4
    engine = engine_of(smollm2, tmp_path, "float32", said(shapes, "KV cache"))
    assert said(shapes, "weights") == held_bytes(engine)
    assert kv_bytes(engine) == said(shapes, "KV cache")
    lora = make_lora(load_model(smollm2), tmp_path / "a", r=16, target_modules="all-linear")
    packed = put_in_a_slot(engine, lora)
    assert packed == adapter_bytes(shapes, 16, "float32") == 19_537_920
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_takes_what_is_said(
    tiny_models: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = tiny_models(family)
    lora = make_lora(load_model(model), tmp_path / "a", r=4, target_modules="all-linear")
    engine = engine_of(model, tmp_path, "float32", 1 << 20)
    assert put_in_a_slot(engine, lora) == adapter_bytes(read_shapes(model), 4, "float32")
    engine.close()


def put_in_a_slot(engine: Engine, folder: Path) -> int:
    """The adapter's bytes on the device, once a row has used it."""
    ref = publish(Objects.open(engine.settings.store_url), engine.base, folder)
    (done,) = run(engine, [Generate("row", "tenant", [5, 6, 7], Sampling(max_tokens=1, seed=0), ref)])
    assert done.error is None
    return engine.cache.nbytes


def test_a_tied_output_layer_is_held_twice_only_where_it_is_packed(
    tiny_models: Callable[[str], Path],
) -> None:
    shapes = read_shapes(tiny_models("qwen3"))
    table = shapes.base.vocab_size * shapes.base.hidden_size
    assert shapes.packed - shapes.weights >= table
    assert said(shapes, "weights", "bfloat16") == shapes.weights * torch.bfloat16.itemsize


def test_slots_and_ram_share_what_there_is(tiny_models: Callable[[str], Path]) -> None:
    shapes = read_shapes(tiny_models("llama"))
    one = adapter_bytes(shapes, 4, "float32")
    assert said(shapes, "adapters in slots") == SLOTS * one
    assert said(shapes, "adapters in RAM") == (5 - SLOTS) * one
    assert said(shapes, "adapters in the store") == 5 * one
