"""The main loop of the engine process: passes messages between the API processes and the engine."""

import logging
import time
import uuid
from collections import defaultdict

import msgspec
import zmq

from server.adapters.sites import encode_base
from server.engine.engine import Engine
from server.engine.snapshot import stats
from server.engine.unexpected_errors import as_polypeft_error
from server.engine.watchdog import Watchdog
from server.kernels.cpu.paged_attention import BLOCK
from server.messages import (
    Cancel,
    Check,
    Checked,
    Chunk,
    Chunks,
    Command,
    Event,
    Hello,
    Ready,
    Request,
    decode_command,
    encode,
)

STATS_SECONDS = 1.0
IDLE_MILLISECONDS = 200
LOADING_MILLISECONDS = 1  # when rows wait for an adapter and no row runs

log = logging.getLogger(__name__)


class EngineServer:
    """Receives commands on a ROUTER socket, runs the engine, and sends each API process its own events."""

    def __init__(self, engine: Engine, address: str) -> None:
        self.engine = engine
        self.boot = uuid.uuid4().hex
        self.stopping = False
        self.peers: set[bytes] = set()
        self.owners: dict[str, bytes] = {}  # id of a row or check -> the peer that sent it
        self.next_stats = 0.0
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to an API process that is gone fails
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)  # rows are capped: a chunk is never dropped
        self.socket.bind(address)
        self.watchdog = Watchdog(engine.clock, self.boot, address)

    def run(self) -> None:
        """Receive commands, run steps and send their events until `stop`."""
        self.watchdog.start()
        while not self.stopping:
            self.engine.clock.next_iteration()
            idle = not self.drain()
            if self.engine.busy:
                self.deliver(self.engine.step())
            elif idle:
                self.engine.use_idle_time()
            for checked in self.engine.checked():
                self.send_result(checked)
            self.send_stats()

    def stop(self, *_signal: object) -> None:
        self.stopping = True

    def drain(self) -> bool:
        """Handle every command that has arrived, and return whether there was one.

        Waits for one only if there is nothing to compute.
        """
        wait, handled = IDLE_MILLISECONDS, False
        if self.engine.busy:
            wait = 0 if self.engine.scheduler.running else LOADING_MILLISECONDS
        while self.socket.poll(wait):
            peer, *frames = self.socket.recv_multipart()
            self.handle(peer, b"".join(frames))
            wait, handled = 0, True
        return handled

    def handle(self, peer: bytes, frame: bytes) -> None:
        """Execute one encoded command. An error ends that command only."""
        try:
            command = decode_command(frame)
        except msgspec.MsgspecError:
            self.engine.counts["internal_errors"] += 1
            log.exception("A command of %d bytes could not be read", len(frame))
            return
        try:
            self.execute(peer, command)
        except Exception as error:  # noqa: BLE001 - any error: `as_polypeft_error` logs it
            self.engine.counts["internal_errors"] += 1
            fault = as_polypeft_error(error, f"this {type(command).__name__}")
            match command:
                case Request(rows=rows):  # all rows fail together
                    for row in rows:
                        self.engine.submit(Cancel(row.id))
                    self.deliver([Chunk.failure(row.id, fault) for row in rows])
                case Check(id=id_):
                    self.send_result(Checked(id_, (fault.code, fault.message, fault.param)))

    def execute(self, peer: bytes, command: Command) -> None:
        """Answer Hello; pass any other command to the engine and note which peer gets its events."""
        match command:
            case Hello():
                self.peers.add(peer)
                self.send(peer, self.ready())
                return
            case Request(rows=rows):
                self.owners.update({row.id: peer for row in rows})
            case Check(id=id_):
                self.owners[id_] = peer
            case Cancel(id=id_):
                self.owners.pop(id_, None)
        self.engine.submit(command)

    def deliver(self, chunks: list[Chunk]) -> None:
        """Send chunks to the peers that own their rows, one message for each peer."""
        by_peer: defaultdict[bytes, list[Chunk]] = defaultdict(list)
        for chunk in chunks:
            if peer := self.owners.get(chunk.id):
                by_peer[peer].append(chunk)
            if chunk.finish:
                self.owners.pop(chunk.id, None)
        for peer, peer_chunks in by_peer.items():
            self.send(peer, Chunks(peer_chunks))

    def send_result(self, checked: Checked) -> None:
        """Send the result of a check to the peer that asked for it."""
        if peer := self.owners.pop(checked.id, None):
            self.send(peer, checked)

    def send_stats(self) -> None:
        """Send metrics to every peer, about once a second."""
        now = time.monotonic()
        if now < self.next_stats:
            return
        self.next_stats = now + STATS_SECONDS
        message = stats(self.engine, self.boot)
        for peer in sorted(self.peers):
            self.send(peer, message)

    def ready(self) -> Ready:
        """The answer to Hello: the base model and the limits."""
        settings, base = self.engine.settings, self.engine.base
        limits = {
            "max_seqs": settings.max_seqs,
            "max_queue": settings.max_queue,
            "max_model_len": base.max_context,
            "max_batch_tokens": self.engine.scheduler.max_batch_tokens,
            "kv_blocks": self.engine.blocks.count,
            "kv_block_tokens": BLOCK,
            "adapter_slots": settings.adapter_slots,
        }
        return Ready(self.boot, encode_base(base), limits)

    def send(self, peer: bytes, event: Event) -> bool:
        """Send an event. False if the API process is gone: its rows are cancelled."""
        try:
            self.socket.send_multipart([peer, encode(event)])
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.forget_peer(peer)
            return False
        return True

    def forget_peer(self, peer: bytes) -> None:
        """Cancel the rows of an API process that is gone."""
        self.peers.discard(peer)
        for id_ in [id_ for id_, owner in self.owners.items() if owner == peer]:
            del self.owners[id_]
            self.engine.submit(Cancel(id_))
