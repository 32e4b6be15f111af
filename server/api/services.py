"""What a request handler may use. Built once by server.api.app; holds no state of its own but `draining`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from anyio import CapacityLimiter
from redis.asyncio import Redis

from adapters_store.object_store.store import Objects
from adapters_store.registry.presigned_uploads import PresignedUploads
from adapters_store.registry.registry import Registry
from server.adapters.sites import Base
from server.adapters.specs.interface import SpecReader
from server.api.cluster_metrics import ClusterMetrics
from server.base_model.tokenizer import Tokenizer
from server.engine.client import EngineClient
from server.errors import DeadlineExceeded, InvalidRequest, StartupError, Unavailable
from server.files.files import FileStore
from server.files.uploads import Uploads
from server.finetune.jobs.jobs import Jobs
from server.metrics import Metrics
from server.settings import Settings
from server.tenancy.pins import Pins
from server.tenancy.tenants import Tenants


class FairLock:
    def __init__(self) -> None:
        self._all = asyncio.Lock()
        self._tenants: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, tenant: str, seconds: float) -> AsyncIterator[None]:
        """The block is this tenant's turn. Raises DeadlineExceeded if waiting and block take longer."""
        lock = self._tenants.setdefault(tenant, asyncio.Lock())  # held by `lock` alone: gone when unused
        try:
            async with asyncio.timeout(seconds), lock, self._all:
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"The request took more than {seconds:g} s.") from None


FOLLOWERS = 256  # streams of jobs' events at a time


@dataclass
class Services:
    settings: Settings
    operator_secret: str
    tokenizer: Tokenizer
    redis: Redis
    objects: Objects
    registry: Registry
    methods: dict[str, SpecReader]
    tenants: Tenants
    engine: EngineClient
    metrics: Metrics
    system_figures: ClusterMetrics
    files: FileStore
    uploads: Uploads
    directs: PresignedUploads
    jobs: Jobs
    pins: Pins
    checking: FairLock = field(default_factory=FairLock)  # training data: takes a core, and seconds
    tokenizing: FairLock = field(default_factory=FairLock)  # long prompts: one that fits may take a second
    following: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(FOLLOWERS))
    converting: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))  # each takes memory
    draining: bool = False  # SIGTERM came: what runs may finish, nothing new begins
    refusal: StartupError | None = None  # found after the start: this process may not go on

    @property
    def base(self) -> Base:
        """The base as the engine described it. Raises Unavailable before its first word."""
        if self.engine.base is None:
            raise Unavailable("The engine is starting; try again in a moment.")
        return self.engine.base

    @property
    def max_context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.limits.get("max_model_len") or self.base.max_context

    def refuse_if_draining(self) -> None:
        if self.draining:
            self.metrics.count("rejections", "draining")
            raise Unavailable("The server is shutting down; send the request elsewhere or later.")

    def admit(self, rows: int) -> None:
        """Raise Unavailable while draining, InvalidRequest for more rows than there can ever be room for.

        Whether there is room now, for all rows of a request or none, the engine decides: it alone knows
        what all API processes have sent it.
        """
        self.refuse_if_draining()
        if not self.engine.ready:
            self.metrics.count("rejections", "engine_unavailable")
            return
        if rows > self.max_rows:
            raise InvalidRequest(
                f"The request asks for {rows} choices, of all prompts together; "
                f"the server takes {self.max_rows} rows at a time.",
                param="n",
            )

    @property
    def max_rows(self) -> int:
        """Rows in the engine, running and waiting."""
        return self.engine.limits["max_seqs"] + self.engine.limits["max_queue"]
