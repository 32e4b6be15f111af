"""The engine's part of the ledger of usage: a record of each adapter load, in journals (server/usage/)."""

import logging
import time
import uuid
from pathlib import Path

from server.adapters.loading.loader import Load
from server.usage.journal import write_journal
from server.usage.record import COMPLETED, Record, adapter_version

MAX_UNWRITTEN = 10_000  # records, while the disk takes none
log = logging.getLogger(__name__)


class LoadRecords:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unwritten: list[Load] = []

    def write(self, loads: list[Load]) -> None:
        """Leave these to the API processes, which add them to the ledger. Raises nothing."""
        self._unwritten += loads[: MAX_UNWRITTEN - len(self._unwritten)]
        if not self._unwritten:
            return
        records = [_record(load, number) for number, load in enumerate(self._unwritten, 1)]
        try:
            write_journal(self._folder, records)
        except OSError as error:
            log.warning("%d loads of adapters are recorded later: %s", len(records), error.strerror)
        else:
            self._unwritten.clear()


def _record(load: Load, number: int) -> Record:
    version = load.version
    return Record(
        id=f"load-{uuid.uuid4().hex}",
        kind="load",
        number=number,
        at=time.time(),
        tenant=version.tenant,
        adapter=adapter_version(version.name, version.version),
        outcome=load.error or COMPLETED,
        bytes=load.nbytes,
        seconds=round(load.seconds, 6),
    )
