"""A job's events as they come, until the job is over."""

import asyncio
from collections.abc import AsyncGenerator

from anyio import WouldBlock

from server.api.fine_tuning.json_objects import event_id, event_object
from server.api.http.streaming import Identified, KeepAlive
from server.api.services import Services
from server.errors import NotFound, Unavailable, shown

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
PAGE = 100


async def follow(deps: Services, job: str, after: int) -> AsyncGenerator[object, None]:
    """Those numbered over `after` there are, then those to come.

    Raises Unavailable when the stream ends before the job: come again with the last id.
    """
    token = object()
    try:
        deps.event_streams.acquire_on_behalf_of_nowait(token)
    except WouldBlock:
        most = deps.event_streams.total_tokens
        raise Unavailable(f"{most:g} streams of events are open, the most there may be.") from None
    try:
        async for event in _follow(deps, job, after):
            yield event
    finally:
        deps.event_streams.release_on_behalf_of(token)


async def _follow(deps: Services, job: str, after: int) -> AsyncGenerator[object, None]:
    clock = asyncio.get_running_loop()
    until = clock.time() + deps.settings.request_seconds
    alive = 0.0
    while True:
        found = await deps.jobs.find(job)  # before its events: then none comes after the last look
        if found is None:
            raise NotFound(f"There is no fine-tuning job {shown(job)} any more.")
        events = await deps.jobs.events(job, after=after, limit=PAGE)
        for event in events:
            after = event.sequence
            yield Identified(event_id(job, after), event_object(job, event))
        if events:
            alive = clock.time()
            continue
        if found.phase == "done":
            return
        if deps.draining or clock.time() > until:
            raise Unavailable("This stream ends before the job; come again with the last event's id.")
        if clock.time() - alive > KEEP_ALIVE_SECONDS:
            alive = clock.time()
            yield KeepAlive()
        await asyncio.sleep(POLL_SECONDS)
