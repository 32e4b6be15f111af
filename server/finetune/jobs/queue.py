"""How a worker is called: an rq job on the same Valkey, JSON only. Knows nothing of what the job is.

Only a call: it may be lost with a worker, or come twice. What a job's state is, and who has it, the records
in `jobs` say; whoever is called asks them.
"""

import uuid

from anyio.to_thread import run_sync
from redis import Redis
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, TimeoutError  # noqa: A004 - redis names them so
from redis.retry import Retry
from rq import Queue
from rq.serializers import JSONSerializer

from adapters_store.valkey import ANSWER_SECONDS, CONNECT_SECONDS, store_errors

NAME = "finetune"
RUN = "server.finetune.worker.worker.run"  # by name: the caller imports no worker
SEPARATOR = "_"


class WorkerQueue:
    """All calls raise StoreError when Valkey does not answer."""

    def __init__(self, url: str) -> None:
        connection = Redis.from_url(
            url,
            socket_timeout=ANSWER_SECONDS,
            socket_connect_timeout=CONNECT_SECONDS,
            retry=Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), retries=2),
            retry_on_error=[ConnectionError, TimeoutError],
        )
        self._queue = Queue(NAME, connection=connection, serializer=JSONSerializer)

    async def call(self, job: str) -> None:
        await run_sync(self._call, job)

    async def called(self) -> set[str]:
        """The jobs that a call waits for in the queue."""
        return await run_sync(self._called)

    def close(self) -> None:
        self._queue.connection.close()

    def _call(self, job: str) -> None:
        with store_errors():
            self._queue.enqueue_call(
                RUN,
                args=[job],
                job_id=f"{job}{SEPARATOR}{uuid.uuid4().hex}",
                timeout=-1,  # the worker keeps the limits itself: rq would raise in the middle of a step
                result_ttl=0,
                failure_ttl=3600,
            )

    def _called(self) -> set[str]:
        with store_errors():
            return {call.partition(SEPARATOR)[0] for call in self._queue.job_ids}
