"""An engine's KV event publisher as vLLM's and SGLang's are: a PUB, a bounded buffer, a replay ROUTER in a thread."""

from __future__ import annotations

import threading
from collections import deque
from time import time
from typing import Any

import msgpack
import zmq

END = (-1).to_bytes(8, "big", signed=True)


class EnginePublisher:
    """``endpoint`` and ``replay`` to bind, port 0 for any. ``topics``: replays carry the topic, as newer engines do.

    ``cache`` holds the ids of what was published and not removed; blocks have four tokens.
    """

    def __init__(
        self,
        endpoint: str = "tcp://127.0.0.1:0",
        replay: str = "tcp://127.0.0.1:0",
        *,
        keep: int = 10_000,
        topics: bool = True,
    ) -> None:
        self.cache: set[int] = set()
        self.mute = False
        """Replay requests stay unanswered."""
        self.requests: list[int] = []
        self._seq = 0
        self._topics = topics
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keep)
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._router = self._context.socket(zmq.ROUTER)
        for socket, place in ((self._pub, endpoint), (self._router, replay)):
            socket.linger = 0
            socket.bind(place)
        self.endpoint, self.replay = (
            socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for socket in (self._pub, self._router)
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def store(self, block: int, *, parent: int | None = None, lost: bool = False) -> None:
        """Publish one stored block; ``lost``: nobody gets it live."""
        self.cache.add(block)
        event = {"type": "BlockStored", "block_hashes": [block], "parent_block_hash": parent}
        self.publish([event | {"token_ids": [block] * 4, "block_size": 4, "lora_id": None, "medium": "GPU"}], lost=lost)

    def remove(self, block: int, *, lost: bool = False) -> None:
        self.cache.discard(block)
        self.publish([["BlockRemoved", [block], "GPU"]], lost=lost)

    def clear(self) -> None:
        self.cache.clear()
        self.publish([{"type": "AllBlocksCleared"}])

    def publish(self, events: list[Any], *, lost: bool = False) -> None:
        self.publish_bytes(msgpack.packb([time(), events, 0]), lost=lost)

    def publish_bytes(self, payload: bytes, *, lost: bool = False) -> None:
        if not lost:
            self._pub.send_multipart([b"kv", self._seq.to_bytes(8, "big"), payload])
        self._kept.append((self._seq, payload))
        self._seq += 1

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(10):
                continue
            client, _, start = self._router.recv_multipart()
            first = int.from_bytes(start, "big")
            self.requests.append(first)
            if self.mute:
                continue
            topic = [b"kv"] if self._topics else []
            for seq, payload in [one for one in self._kept if one[0] >= first]:
                self._router.send_multipart([client, b"", *topic, seq.to_bytes(8, "big"), payload])
            self._router.send_multipart([client, b"", *([b""] if self._topics else []), END, b""])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._pub.close()
        self._router.close()
        self._context.term()
