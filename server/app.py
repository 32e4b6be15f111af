"""Builds every object of the API process once, by hand, and wires them. The only file that does."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio.to_thread import run_sync
from fastapi import FastAPI

from adapters_store.objects import Objects
from adapters_store.registry import Registry
from adapters_store.valkey import connect
from server.adapters.methods import build_methods
from server.api import adapters, admin, chat, completions, health, limits, lora_compat, models
from server.api.envelope import Envelope
from server.api.errors import add_handlers
from server.api.services import Services
from server.api.text import Tokenizer
from server.base.resolve import resolve_model
from server.engine.client import EngineClient
from server.errors import StartupError
from server.metrics import Metrics
from server.settings import Settings
from server.tenancy.keys import operator_key
from server.tenancy.tenants import Tenants

ROUTERS = (completions, chat, models, adapters, lora_compat, limits, admin, health)


def build_app(settings: Settings) -> FastAPI:
    """The application; its lifespan opens what it needs and closes it again. Waits for no engine."""
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with open_services(settings, metrics) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="Polypeft",
        lifespan=lifespan,
        docs_url=None,  # deny by default: what is not a router below does not exist
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    for module in ROUTERS:
        app.include_router(module.router)
    add_handlers(app)
    app.add_middleware(Envelope, metrics=metrics)
    return app


@asynccontextmanager
async def open_services(settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
    if settings.redis_url is None:
        raise StartupError("The API needs redis_url; `polypeft serve` sets it to the Valkey it starts.")
    tokenizer = await run_sync(lambda: Tokenizer.load(resolve_model(settings)))
    redis = connect(settings.redis_url)
    objects = Objects.open(settings.store_url)
    engine = EngineClient(settings.engine_socket, on_stats=metrics.absorb)
    await engine.start()
    try:
        yield Services(
            settings=settings,
            operator_secret=operator_key(settings.data_dir)[0],
            tokenizer=tokenizer,
            redis=redis,
            objects=objects,
            registry=Registry(objects, redis, settings.max_adapters_per_tenant),
            methods=build_methods(settings.max_lora_rank),
            tenants=Tenants(redis),
            engine=engine,
            metrics=metrics,
        )
    finally:
        await engine.close()
        await redis.aclose()
