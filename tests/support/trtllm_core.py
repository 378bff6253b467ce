"""What computes in the double of TensorRT-LLM: the simulated engine, so that tokens are a function of the KV cache's
bytes, in a thread; and the transport by which one such process fetches another's blocks.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pdyn.engines.base import (
    BlocksCleared,
    BlocksRemoved,
    BlocksStored,
    EngineOptions,
    Held,
    KvEvent,
    Output,
    Release,
    Reserved,
    Sequence,
    Settle,
)
from p2pdyn.engines.sim import SimEngine
from p2pdyn.engines.sim_args import SimArgs

NARROW = 128
"""Tokens: the double's model has layers of this sliding window, too."""


class ContractError(RuntimeError):
    """The adapter did what TensorRT-LLM does not allow."""


@dataclass(frozen=True)
class Knobs:
    """``gap_at``: events that are lost, by number. ``pull_s``: how long a fetch takes to begin. ``poison``: a request
    for so many tokens ends the engine at its third. ``report``: file for what broke the contract. ``stray``: start a
    process in a session of its own, as MPI does."""

    report: str = ""
    itl_ms: float = 1.0
    gap_at: tuple[int, ...] = ()
    pull_s: float = 0.0
    poison: int = 0
    stray: bool = False

    @classmethod
    def read(cls) -> Knobs:
        return cls(**json.loads(os.environ.get("TRTLLM_DOUBLE", "{}")))

    def violated(self, what: str) -> ContractError:
        """Written down, as the adapter may well swallow what is raised."""
        if self.report:
            with Path(self.report).open("a") as file:
                file.write(what + "\n")
        return ContractError(what)


class Core:
    """``on_output`` and ``on_note`` are called in the core's thread, for a sequence's key."""

    def __init__(self, model: str, args: SimArgs, knobs: Knobs, events: Callable[[list[KvEvent]], None]) -> None:
        self.engine = SimEngine(EngineOptions(model), args)
        self.engine.load(lambda fraction, what: None)
        self.size, self.stride = args.block_size, args.kv_bytes_per_block
        self.on_output: dict[int, Callable[[Output], None]] = {}
        self.on_note: dict[int, Callable[[Held | Reserved], None]] = {}
        self.stats: deque[dict[str, Any]] = deque(maxlen=1000)
        self._events = events
        self._iteration = 0
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="trtllm-double", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[], None]) -> None:
        """Have it done in the core's thread."""
        self._inbox.put(work)

    def submit(self, sequence: Sequence) -> None:
        self.call(lambda: self.engine.submit(sequence, time.monotonic()))

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join(5)

    def bytes_of(self, blocks: tuple[int, ...]) -> list[bytes]:
        memory = self.engine.memory
        assert memory is not None
        return [bytes(memory[block * self.stride : (block + 1) * self.stride]) for block in blocks]

    def write(self, blocks: tuple[int, ...], contents: list[bytes]) -> None:
        memory = self.engine.memory
        assert memory is not None
        for block, content in zip(blocks, contents, strict=True):
            memory[block * self.stride : (block + 1) * self.stride] = content

    def _run(self) -> None:
        while True:
            now = time.monotonic()
            due = self.engine.next_step(now)
            with suppress(queue.Empty):
                work = self._inbox.get(timeout=None if due is None else max(0.0, due - now))
                if work is None:
                    self.engine.close()
                    return
                work()
                continue
            self._step()

    def _step(self) -> None:
        step = self.engine.step(time.monotonic())
        self._iteration += 1
        load = self.engine.load_report()
        cache = {"maxNumBlocks": load.kv_total, "usedNumBlocks": load.kv_used, "tokensPerBlock": self.size}
        batch = {"numQueuedCtxTokens": load.prefill_tokens_queued}
        counts = {"numActiveRequests": load.active_requests, "numQueuedRequests": load.queued}
        self.stats.append({"iter": self._iteration, **counts, "kvCacheStats": cache, "inflightBatchingStats": batch})
        self._events(step.kv)
        for note in step.transfers:
            if note.key in self.on_note:
                self.on_note[note.key](note)
        for output in step.outputs:
            if output.key in self.on_output:
                self.on_output[output.key](output)


class EventLog:
    """KV events as TensorRT-LLM numbers and keeps them: with those of a narrower window, and of partial blocks."""

    def __init__(self, size: int, blocks: int, kept: int, salts: bool, gap_at: tuple[int, ...]) -> None:
        self.kept: deque[dict[str, Any]] = deque(maxlen=kept)
        self._size, self._salts, self._gap_at = size, salts, gap_at
        self._number = 0
        self._partial: list[int] = []
        for window in (NARROW, 1 << 20):
            self._add({"type": "created", "num_blocks_per_cache_level": [blocks, 0]}, window)

    def tell(self, events: list[KvEvent]) -> None:
        for event in events:
            match event:
                case BlocksStored():
                    self._stored(event)
                case BlocksRemoved():
                    self._add({"type": "removed", "block_hashes": [*self._partial, *event.hashes]})
                    self._partial.clear()
                case BlocksCleared():
                    raise AssertionError("the simulated engine never does")

    def _stored(self, event: BlocksStored) -> None:
        size, salt = self._size, {"cache_salt": event.salt or None} if self._salts else {}
        blocks = [
            {**_block(name, event.tokens[i * size : (i + 1) * size]), **salt} for i, name in enumerate(event.hashes)
        ]
        if self._number % 3 == 0:  # the rest of a sequence, which is told as well
            self._partial.append(2**63 + self._number)
            blocks.append(_block(self._partial[-1], (1, 2, 3)))
        lora = {"lora_name": event.lora or None} if self._salts else {}
        self._add({"type": "stored", "parent_hash": event.parent, "blocks": blocks, **lora})
        narrow = [_block(name ^ 1, (5,) * size) for name in event.hashes]
        self._add({"type": "stored", "parent_hash": None, "blocks": narrow}, NARROW)

    def _add(self, data: dict[str, Any], window: int = 1 << 20) -> None:
        if self._number not in self._gap_at:
            self.kept.append({"event_id": self._number, "data": data, "window_size": window})
        self._number += 1


def _block(name: int, tokens: tuple[int, ...]) -> dict[str, Any]:
    unique = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": name, "tokens": unique, "cache_level": 0, "priority": 35}


class Transceiver:
    """The context side's blocks, for whoever names a hand-over: once, and then they are free."""

    def __init__(self, core: Core) -> None:
        self.waiting: dict[int, Held] = {}
        self._core = core
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, name="trtllm-double-kv", daemon=True).start()

    def end(self, name: int) -> None:
        held = self.waiting.pop(name, None)
        if held is not None:
            self._core.call(lambda: self._core.engine.transfer(Release(held.key), time.monotonic()))

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # else accept does not return
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                peer, _ = self._socket.accept()
            except OSError:
                return
            with peer, suppress(OSError):
                name = int.from_bytes(peer.recv(8), "big")
                held = self.waiting.get(name)
                if held is not None:
                    peer.sendall(b"".join(self._core.bytes_of(held.blocks)))
                    self.end(name)


def fetch(port: int, name: int, stride: int) -> list[bytes]:
    """All blocks of a hand-over. Raises OSError."""
    with socket.create_connection(("127.0.0.1", port), 5) as peer:
        peer.sendall(name.to_bytes(8, "big"))
        peer.shutdown(socket.SHUT_WR)
        data = b""
        while part := peer.recv(1 << 16):
            data += part
    return [data[at : at + stride] for at in range(0, len(data), stride)]


def settle(core: Core, reserved: Reserved, contents: list[bytes]) -> None:
    """Fill what was reserved with what came, as far as it reaches."""
    mine = contents[reserved.first : reserved.first + len(reserved.blocks)]
    core.write(reserved.blocks[: len(mine)], mine)
    if reserved.blocks:
        core.engine.transfer(Settle(reserved.key, len(mine)), time.monotonic())
