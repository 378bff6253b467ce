"""The thread that NIXL lives in. It sleeps while nothing is under way."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from time import monotonic

from p2pdyn.transfer.base import Region, TransferError
from p2pdyn.transfer.nixl_agent import Agent
from p2pdyn.transfer.nixl_blocks import OwnBlocks
from p2pdyn.transfer.nixl_reads import Job, Reads

CLOSE_S = 1.0
"""Seconds that reads under way have to end by themselves when the thread is stopped."""
SHORTEST_S, LONGEST_S = 50e-6, 5e-3
"""Between two looks at reads under way: a sixteenth of the time since something moved, within these."""

Order = Callable[[Reads], None]


class NixlThread(threading.Thread):
    """``on_up()`` and ``on_end()`` are called in the thread, on_end last of all. :attr:`up` is set when the agent is
    there, or when it failed for the reason in :attr:`trouble`."""

    def __init__(
        self,
        peer: str,
        regions: tuple[Region, ...],
        devices: Sequence[str],
        on_up: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="nixl", daemon=True)
        self.up = threading.Event()
        self.trouble = ""
        self.bases: list[int] = []
        """Addresses of the regions."""
        self.metadata = b""
        self._peer = peer
        self._regions = regions
        self._devices = devices
        self._on_up = on_up
        self._on_end = on_end
        self._orders: SimpleQueue[Order | None] = SimpleQueue()
        self._reads: Reads | None = None
        self._turn = threading.Lock()
        """Held while the agent is used."""

    def order(self, order: Order | None) -> None:
        """To be carried out in the thread, in turn, before anything is posted. None: stop."""
        self._orders.put(order)

    def run(self) -> None:
        try:
            own = self._start_agent()
            self._reads = Reads(own)
        except Exception as error:  # of NIXL's: whoever waits must hear of it
            self.trouble = str(error) if isinstance(error, TransferError) else f"NIXL cannot start ({error!r})"
        self.up.set()
        self._on_up()
        try:
            if self._reads is not None:
                self._serve_until_stopped(own, self._reads)
        finally:
            self._regions = ()
            self._on_end()

    def _serve_until_stopped(self, own: OwnBlocks, reads: Reads) -> None:
        try:
            self._serve(reads)
        finally:
            with self._turn:
                self._reads = None
                own.agent.close()
                reads.abandon("the mover is closed")

    def _start_agent(self) -> OwnBlocks:
        agent = Agent(self._peer, self._devices)
        own = OwnBlocks(agent, self._regions)
        self.bases, self.metadata = own.bases, agent.metadata()
        return own

    def _serve(self, reads: Reads) -> None:
        until = moved = 0.0
        while not until or (reads.busy() and monotonic() < until):
            pause = min(LONGEST_S, max(SHORTEST_S, (monotonic() - moved) / 16)) if reads.busy() else None
            while True:
                try:
                    order = self._orders.get(timeout=pause)
                except Empty:
                    break
                if order is None:
                    until = monotonic() + CLOSE_S
                else:
                    with self._turn:
                        order(reads)
                moved, pause = monotonic(), 0.0
            with self._turn:
                while reads.step() and self._orders.empty():
                    moved = monotonic()

    def add_now(self, peer: str, job: Job) -> bool:
        """Called from another thread: carry out a short read there if this one sleeps, and spare both a change of
        threads. False: it does not, nothing was done."""
        if not self._turn.acquire(blocking=False):
            return False
        try:
            reads = self._reads
            if reads is None or reads.busy() or not self._orders.empty():
                return False
            reads.add(peer, job)
            reads.step()
            if reads.busy():  # it goes over a network
                self._orders.put(lambda _: None)
            return True
        finally:
            self._turn.release()
