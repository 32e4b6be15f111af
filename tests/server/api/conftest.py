"""The whole API over real parts and a fake engine: a server on a real port, tenants, and their clients."""

import asyncio
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import openai
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from redis import Redis as SyncRedis
from safetensors.torch import save

from server.adapters.sites import Base, Site
from server.api.__main__ import server_config
from server.api.app import build_app
from server.engine.fake import Behaviour, FakeEngine
from server.settings import Settings
from server.tenancy.keys import operator_key
from tests.server.api.generation.tokenizers import VOCABULARY, byte_level_tokenizer
from tests.waiting import PATIENCE, until

T = TypeVar("T")
HIDDEN = 16
CONTEXT = 256
Files = list[tuple[str, tuple[str, bytes, str]]]


def toy_base(context: int = CONTEXT) -> Base:
    sites = {
        f"model.layers.{i}.self_attn.{name}": Site(
            f"model.layers.{i}.self_attn.{name}", "linear", HIDDEN, HIDDEN, bias=False
        )
        for i in range(2)
        for name in ("q_proj", "v_proj")
    }
    return Base("toy", "llama", "b" * 64, 2, HIDDEN, 2, 8, VOCABULARY, context, sites)


@dataclass
class System:
    """A running server, and a way to touch its loop-bound parts from a test's thread."""

    url: str
    app: FastAPI
    engine: FakeEngine
    settings: Settings
    operator: str
    loop: asyncio.AbstractEventLoop

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    def http(self, key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def tenant(self, name: str) -> str:
        with self.http(self.operator) as client:
            secret: str = client.post("/admin/tenants", json={"name": name}).json()["key"]
        return secret


@pytest.fixture(scope="module")
def system(valkey_url: str) -> Iterator[System]:
    with started(valkey_url) as it:
        yield it


@contextmanager
def started(valkey_url: str, context: int = CONTEXT, **given: Any) -> Iterator[System]:
    """A system of its own on an empty Valkey; `context` is the base's, `given` are settings."""
    folder = Path(tempfile.mkdtemp(prefix="pp"))
    model = folder / "model"
    byte_level_tokenizer(model)
    with SyncRedis.from_url(valkey_url) as redis:
        redis.flushall()
    settings = Settings(
        model=str(model),
        data_dir=folder,
        redis_url=valkey_url,
        max_queue=8,
        max_body_bytes=1 << 20,
        max_upload_bytes=1 << 20,
        max_adapters_per_tenant=20,
        lora_folder=folder / "loras",
        **given,
    )
    settings.run_dir.mkdir(parents=True)
    with running(settings, context=context) as system:
        yield system
    shutil.rmtree(folder)


class running:  # noqa: N801 - used as a context manager
    """Server and fake engine in one thread's loop, until the block ends."""

    def __init__(
        self,
        settings: Settings,
        build: Callable[[Settings], FastAPI] = build_app,
        context: int = CONTEXT,
    ) -> None:
        self._settings = settings
        self._base = toy_base(context)
        self._build = build
        self._up: threading.Event = threading.Event()
        self._system: System | None = None
        self._server: uvicorn.Server | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    def __enter__(self) -> System:
        self._thread.start()
        assert self._up.wait(PATIENCE)
        assert self._system is not None
        return self._system

    def __exit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        app = self._build(self._settings)
        engine = FakeEngine(self._settings.engine_socket, self._base, {"max_seqs": 8, "max_queue": 8})
        await engine.start()
        config = server_config(app, self._settings.model_copy(update={"port": 0}))
        self._server = server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not (server.started and app.state.services.engine.ready):
            await asyncio.sleep(0.01)
            assert not task.done(), task.exception()
        port = server.servers[0].sockets[0].getsockname()[1]
        operator = operator_key(self._settings)
        loop = asyncio.get_running_loop()
        self._system = System(f"http://127.0.0.1:{port}", app, engine, self._settings, operator, loop)
        self._up.set()
        await task
        await engine.close()


@pytest.fixture
def engine(system: System) -> Iterator[FakeEngine]:
    """The fake engine, as good as new: nothing runs, nothing is remembered."""
    fake = system.engine
    fake.behaviour = Behaviour()
    yield fake
    fake.behaviour = Behaviour()
    until(lambda: fake.running == 0)
    for seen in (fake.seen, fake.cancelled, fake.forgotten, fake.checked):
        seen.clear()


@pytest.fixture(scope="module")
def key(system: System) -> str:
    return system.tenant("alice")


@pytest.fixture(scope="module")
def other_key(system: System) -> str:
    return system.tenant("bob")


@pytest.fixture
def http(system: System, key: str, engine: FakeEngine) -> Iterator[httpx.Client]:
    with system.http(key) as client:
        yield client


@pytest.fixture
def sdk(system: System, key: str, engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{system.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture
async def asdk(system: System, key: str, engine: FakeEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{system.url}/v1", api_key=key, max_retries=0) as client:
        yield client


def lora_files(seed: int = 0, rank: int = 4, **config: Any) -> Files:
    """What PEFT's save_pretrained writes for a LoRA of toy_base, as multipart parts."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in toy_base().sites:
        stem = f"base_model.model.{site}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=rng)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(HIDDEN, rank, generator=rng)
    return parts(save(tensors, {"format": "pt"}), lora_config(r=rank, **config))


def lora_config(**fields: Any) -> dict[str, Any]:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return config | {"task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True} | fields


def parts(weights: bytes, config: dict[str, Any] | bytes, name: str = "adapter_model.safetensors") -> Files:
    raw = config if isinstance(config, bytes) else json.dumps(config).encode()
    return [
        ("files", ("README.md", b"# an adapter", "text/markdown")),
        ("files", ("adapter_config.json", raw, "application/json")),
        ("files", (name, weights, "application/octet-stream")),
    ]


def upload(client: httpx.Client, name: str, files: Files | None = None, **fields: str) -> httpx.Response:
    return client.post("/v1/adapters", data={"name": name, **fields}, files=files or lora_files())
