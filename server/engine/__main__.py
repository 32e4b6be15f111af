"""The engine process: `python -m server.engine`."""

import logging
import signal
import time
from typing import TYPE_CHECKING

from server.base_model.modeling_import import import_modeling
from server.base_model.resolve import resolve_model
from server.child_process import run_child
from server.memory import paused_garbage_collector
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine.server import EngineServer

log = logging.getLogger(__name__)


def serve(settings: Settings) -> None:
    """Load the model and serve it until SIGTERM. Raises StartupError for a model that cannot be served."""
    with paused_garbage_collector():
        server = _load(settings)
    server.run()
    engine = server.engine
    engine.close()
    if log.isEnabledFor(logging.DEBUG):  # it takes seconds for a large base
        log.debug("%s ends, weights %s", engine.base.id, engine.model.digest()[:16])


def _load(settings: Settings) -> "EngineServer":
    start = time.perf_counter()
    import_modeling()
    # torch and transformers: half of the start
    from server.base_model.compatibility import check_architecture
    from server.engine.engine import Engine
    from server.engine.server import EngineServer

    folder = resolve_model(settings)
    check_architecture(folder)
    engine = Engine(settings, folder)
    server = EngineServer(engine, settings.engine_socket)
    signal.signal(signal.SIGTERM, server.stop)
    signal.signal(signal.SIGINT, server.stop)
    log.info(
        "%s ready in %.1f s, weights %s", engine.base.id, time.perf_counter() - start, engine.base.digest[:16]
    )
    return server


if __name__ == "__main__":
    run_child("engine", serve)
