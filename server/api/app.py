"""Builds and wires every object of the API process, once and by hand. No other file does."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

from fastapi import FastAPI

from adapters_store.object_store.store import Objects
from adapters_store.outage import LastAnswers, Outage
from adapters_store.registry.identity import prove_identity_in_time
from adapters_store.registry.presigned_uploads import PresignedUploads
from adapters_store.registry.registry import Registry
from adapters_store.valkey import connect
from server.adapters.specs import build_readers
from server.api.adapters.bucket_watcher import BucketWatcher
from server.api.adapters.cleanup import CleanupLoop
from server.api.adapters.publish import TrainedAdmission
from server.api.asgi.cors import CrossOrigin
from server.api.asgi.head_requests import HeadRequests
from server.api.asgi.middleware import RequestMiddleware
from server.api.cluster_metrics import ClusterMetrics
from server.api.http.error_responses import add_handlers
from server.api.http.temp_files import clear_temp_folders
from server.api.routes import (
    audit,
    chat,
    completions,
    files,
    fine_tuning,
    health,
    limits,
    models,
    own_limits,
    tokenize,
    uploads,
    usage,
)
from server.api.routes import keys as own_keys
from server.api.routes.adapters import adapters, aliases, pins, vllm_lora
from server.api.routes.adapters import uploads as adapter_uploads
from server.api.routes.admin import audit as admin_audit
from server.api.routes.admin import keys, store, tenants
from server.api.routes.admin import limits as tenant_limits
from server.api.routes.admin import usage as all_usage
from server.api.routes.docs import Docs
from server.api.services import Services
from server.audit.audit_log import AuditLog
from server.base_model.resolve import resolve_model
from server.base_model.tokenizer import Tokenizer
from server.engine.client import EngineClient
from server.errors import StartupError
from server.files.files import FileStore
from server.files.uploads import Uploads
from server.finetune.jobs.jobs import Jobs
from server.finetune.jobs.publisher import Publisher
from server.metrics import Metrics
from server.settings import Settings, multiprocess_dir
from server.tenancy.keys import operator_key
from server.tenancy.limit_records import LimitRecords
from server.tenancy.limits import Limits
from server.tenancy.pins import Pins
from server.tenancy.rate_limits import RateLimits
from server.tenancy.tenants import Tenants
from server.tracing import Tracing
from server.usage.counts import Counts
from server.usage.ledger import Ledger

Loop = Callable[[], Coroutine[None, None, None]]
FIRST_REPORT_SECONDS = 3.0  # a working engine reports its stats every second
log = logging.getLogger(__name__)

# A route is a function of a file in routes/ that has a `router`; a new file is imported above and named here.
ROUTERS = (
    completions,
    chat,
    models,
    adapters,
    adapter_uploads,
    aliases,
    pins,
    files,
    uploads,
    fine_tuning,
    vllm_lora,
    limits,
    own_limits,
    own_keys,
    audit,
    tenants,
    tenant_limits,
    keys,
    admin_audit,
    usage,
    all_usage,
    store,
    tokenize,
    health,
)


def build_app(settings: Settings, tracing: Tracing | None = None) -> FastAPI:
    """The application. Its lifespan starts and closes what needs an event loop, and waits for no engine.

    `tracing` replaces the collector of the settings. Raises StartupError for faults in the settings or the
    model's tokenizer.
    """
    services = build_services(settings)
    watcher = None if settings.watch_prefix is None else BucketWatcher(services, settings.watch_prefix)
    if tracing is None and settings.otlp_endpoint:
        tracing = Tracing.to(settings.otlp_endpoint, settings.trace_share)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        clear_temp_folders(settings)
        await services.engine.start()
        publisher = Publisher(
            services.jobs, services.files, services.registry, services.objects, TrainedAdmission(services)
        )
        loops: list[Loop] = []
        if settings.api_number == 0:
            loops = [
                publisher.run,
                CleanupLoop(services.registry, services.files, services.jobs).run,
                lambda: pins.keep_pins(services),
                lambda: services.audit.keep_settled(2 * settings.request_seconds),
            ]
            loops += [watcher.run] if watcher is not None else []
        background = asyncio.create_task(_run_loops(services, loops))
        renewal = asyncio.create_task(services.rate_limits.renew_leases())
        last_used = asyncio.create_task(services.tenants.keep_last_used())
        usage = asyncio.create_task(services.ledger.run(delete=settings.api_number == 0))
        app.state.services = services
        if settings.api_processes > 1:  # accept no connection, a scrape included, that another serves better
            await services.engine.wait_for_stats(FIRST_REPORT_SECONDS)
        try:
            yield
        finally:
            tasks = (background, renewal, last_used, usage)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await services.engine.close()
            await services.rate_limits.close()
            await services.audit.close()
            await services.ledger.close()
            await services.redis.aclose()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="Polypeft",
        lifespan=lifespan,
        docs_url=None,  # deny by default: only the routers below exist
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    _add_http(app, services, tracing)
    return app


def _add_http(app: FastAPI, services: Services, tracing: Tracing | None) -> None:
    """Routes, the handlers of errors, and middleware."""
    for module in ROUTERS:
        app.include_router(module.router)
    if services.settings.docs:
        app.include_router(Docs([module.router for module in ROUTERS]).router)
    add_handlers(app)
    # the last is the outermost
    app.add_middleware(HeadRequests)
    app.add_middleware(RequestMiddleware, metrics=services.metrics, tracing=tracing)
    if services.settings.origins:
        app.add_middleware(CrossOrigin, origins=services.settings.origins)


async def _run_loops(services: Services, loops: list[Loop]) -> None:
    """Run the background loops, once store and Valkey are known to belong to one system.

    If they do not, the loops would touch another system's jobs and adapters: the process ends instead.
    """
    try:
        if services.objects.shared:
            await prove_identity_in_time(services.redis, services.objects)
    except StartupError as error:
        log.error("%s", error.message)
        services.startup_error = error
        return
    await asyncio.gather(*(loop() for loop in loops))


def build_services(settings: Settings) -> Services:
    """Every object, none of them started. Raises StartupError."""
    if settings.redis_url is None:
        raise StartupError("The API needs redis_url; `polypeft serve` sets it to the Valkey it starts.")
    metrics = Metrics(settings.base_id, multiprocess_dir())
    redis = connect(settings.redis_url)
    redis.on_call = metrics.on_valkey_call
    engine = EngineClient(settings.engine_socket, on_stats=metrics.absorb)
    metrics.engine_up = lambda: engine.responsive
    objects = Objects.open(settings.store_url, settings.store_config)
    objects.on_call = metrics.on_store_call
    metrics.breaker = lambda: objects.breaker.state
    outage = Outage()
    records = LimitRecords(redis, Limits.defaults(settings), LastAnswers(outage, settings.outage_seconds))
    max_files = settings.max_files_per_tenant
    tenant_files = FileStore(redis, objects, max_files=max_files, limits_of=records.in_force)
    return Services(
        settings=settings,
        operator_secret=operator_key(settings),
        tokenizer=Tokenizer.load(resolve_model(settings), settings.tool_format),
        redis=redis,
        objects=objects,
        registry=Registry(
            objects,
            redis,
            records.in_force,
            last=LastAnswers(outage, settings.outage_seconds),
            keep_versions=settings.keep_versions,
            retention_seconds=settings.retention_seconds,
            grace_seconds=settings.grace_seconds,
        ),
        methods=build_readers(settings.max_lora_rank),
        tenants=Tenants(redis, records.defaults, LastAnswers(outage, settings.outage_seconds)),
        audit=AuditLog(redis, settings.audit_days, settings.audit_entries),
        engine=engine,
        metrics=metrics,
        cluster_metrics=ClusterMetrics(redis, metrics, losses=settings.metrics_closed),
        files=tenant_files,
        uploads=Uploads(
            redis,
            objects,
            tenant_files,
            max_bytes=settings.max_file_bytes,
            max_pending=settings.max_uploads_per_tenant,
        ),
        presigned_uploads=PresignedUploads(redis, settings.max_uploads_per_tenant),
        jobs=Jobs(redis, records.in_force),
        pins=Pins(redis, settings.max_pins_per_tenant),
        rate_limits=RateLimits(redis, outage=outage, processes=settings.api_processes),
        limits=records,
        ledger=Ledger(Counts(redis), settings.usage_dir, settings.usage_days, metrics.on_ledger),
    )
