"""The services that request handlers use, in one container; and the lock that shares a core between tenants.

Built once by server.api.app. Its own state is `draining` and `startup_error`.
"""

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
from server.audit.audit_log import AuditLog
from server.base_model.tokenizer import Tokenizer
from server.engine.client import EngineClient
from server.errors import DeadlineExceeded, InvalidRequest, StartupError, Unavailable
from server.files.files import FileStore
from server.files.uploads import Uploads
from server.finetune.jobs.jobs import Jobs
from server.metrics import Metrics
from server.settings import Settings
from server.tenancy.limit_records import LimitRecords
from server.tenancy.pins import Pins
from server.tenancy.rate_limits import RateLimits
from server.tenancy.tenants import Tenants
from server.usage.ledger import Ledger

MAX_EVENT_STREAMS = 256  # open streams of jobs' events


class FairLock:
    """A lock of which each tenant has at most one waiter in the queue, however many requests it sends."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._tenant_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def acquire(self, tenant: str, seconds: float) -> AsyncIterator[None]:
        """Hold the lock for the block. Raises DeadlineExceeded if waiting and block take over `seconds`."""
        tenant_lock = self._tenant_locks.setdefault(tenant, asyncio.Lock())  # collected when none uses it
        try:
            async with asyncio.timeout(seconds), tenant_lock, self._lock:
                yield
        except TimeoutError:
            raise DeadlineExceeded(f"The request took more than {seconds:g} s.") from None


@dataclass
class Services:
    """Every object that handlers share; a parameter of this type is called `deps`."""

    settings: Settings
    operator_secret: str
    tokenizer: Tokenizer
    redis: Redis
    objects: Objects
    registry: Registry
    methods: dict[str, SpecReader]
    tenants: Tenants
    audit: AuditLog
    engine: EngineClient
    metrics: Metrics
    cluster_metrics: ClusterMetrics
    files: FileStore
    uploads: Uploads
    presigned_uploads: PresignedUploads
    jobs: Jobs
    pins: Pins
    rate_limits: RateLimits
    ledger: Ledger
    limits: LimitRecords
    dataset_check_lock: FairLock = field(default_factory=FairLock)  # a check takes a core for seconds
    tokenizer_lock: FairLock = field(default_factory=FairLock)  # for long prompts, which take up to a second
    event_streams: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MAX_EVENT_STREAMS))
    pickle_limiter: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(1))  # of conversions: RAM
    draining: bool = False  # SIGTERM came: running requests may finish, no new one begins
    startup_error: StartupError | None = None  # found after the start: the process must end

    @property
    def base(self) -> Base:
        """The base as the engine described it. Raises Unavailable before the engine has."""
        if self.engine.base is None:
            raise Unavailable("The engine is starting; try again in a moment.")
        return self.engine.base

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and answer together."""
        return self.engine.limits.get("max_model_len") or self.base.max_context

    def refuse_if_draining(self) -> None:
        """Raise Unavailable while the server shuts down."""
        if self.draining:
            self.metrics.count("rejections", "draining")
            raise Unavailable("The server is shutting down; send the request elsewhere or later.")

    def admit(self, rows: int) -> None:
        """Raise Unavailable while draining, InvalidRequest for more rows than the engine ever takes.

        Whether all rows of a request fit now is decided by the engine: it alone knows what all API processes
        have sent.
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
        """Most rows in the engine, running and waiting."""
        return self.engine.limits["max_seqs"] + self.engine.limits["max_queue"]
