"""The KV index: ingest, decision, memory and bytes on the wire; one JSON line each.

The peer in the same run is a naive dict with int bit sets, fed with ready lists of ints, which decodes, numbers, counts
and checks nothing (`ratio`: our time over its time; for ingest our rate over its rate).  Sides alternate; medians.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import statistics
import struct
import time
import tracemalloc
from array import array
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from p2pdyn.core.kvhash import sequence_hashes
from p2pdyn.core.kvindex import KvIndex
from p2pdyn.core.kvjournal import KvJournal
from p2pdyn.core.kvstream import DIGEST_S, EXACT
from p2pdyn.core.types import NodeId
from p2pdyn.engines.base import BlocksRemoved, BlocksStored, KvEvent
from p2pdyn.net.kv_feed import Key, KvFeed
from p2pdyn.net.kv_source import BATCH_S
from p2pdyn.wire.codec import decode, encode
from p2pdyn.wire.events import KvBatch, KvDigest
from p2pdyn.wire.kvpack import DEVICE, REMOVED, STORED, Op, pack_ops, pack_snapshot, xor_all
from p2pdyn.wire.schema import EVENTS

TARGETS = 32
BLOCK = 16
"""Tokens a block."""
PROMPT = 8192
EPOCH = 7
LAG = 64
"""Batches for which a block stays."""
SHARED = 64
"""Leading blocks of a prompt that every target holds: a system prompt."""

Side = Callable[[], float]
"""One timed round, in seconds."""


def alternate(ours: Side, naive: Side, rounds: int) -> tuple[float, float]:
    """The median seconds of each, with the collector off: it would charge either for the other's garbage."""
    sides: tuple[list[float], list[float]] = [], []
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            gc.collect()
            gc.disable()
            sides[which].append((ours, naive)[which]())
            gc.enable()
    return statistics.median(sides[0]), statistics.median(sides[1])


class Batch(NamedTuple):
    """One engine step of the target with ``bit``."""

    bit: int
    stored: list[int]
    removed: list[int]


def churn(blocks: int, per_batch: int, rng: random.Random) -> list[Batch]:
    """One target. Half of each batch is new, half takes away what came ``LAG`` before."""
    steps = [[rng.getrandbits(64) for _ in range(per_batch)] for _ in range(max(2 * LAG, blocks // per_batch // 2))]
    return [Batch(1, stored, steps[at - LAG] if at >= LAG else []) for at, stored in enumerate(steps)]


def sharing(blocks: int, per_batch: int, rng: random.Random) -> list[Batch]:
    """Stores alone, by 8 targets, a quarter of which each of the others holds: the naive figure of the design page."""
    targets = 8
    common = [rng.getrandbits(64) for _ in range(blocks // targets // 4)]
    plan: list[Batch] = []
    for target in range(targets):
        own = common + [rng.getrandbits(64) for _ in range(blocks // targets - len(common))]
        plan += [Batch(1 << target, own[at : at + per_batch], []) for at in range(0, len(own), per_batch)]
    plan.sort(key=lambda _: rng.random())
    return plan


def serving(seconds: int, rng: random.Random, workers: int = 8) -> list[Batch]:
    """What workers with full caches publish: 5 requests/s each of 4096 tokens, half cached, that make 256 tokens each
    at 100 steps a second; so most batches are one block, and most blocks come 128 a batch."""
    cached: list[deque[int]] = [deque(rng.getrandbits(64) for _ in range(4096)) for _ in range(workers)]
    plan = [Batch(1 << at, list(held), []) for at, held in enumerate(cached)]
    for _ in range(100 * seconds):
        for at, held in enumerate(cached):
            new = (2048 // BLOCK if rng.random() < 0.05 else 0) + (rng.random() < 0.8)
            stored = [rng.getrandbits(64) for _ in range(new)]
            if stored:
                plan.append(Batch(1 << at, stored, [held.popleft() for _ in stored]))
                held.extend(stored)
    return plan


class Wire:
    """What the workers of a plan send: a message each batch, and digests."""

    def __init__(self, plan: list[Batch]) -> None:
        self.seqs: dict[str, int] = {}
        self.messages: list[tuple[NodeId, bytes]] = []
        self._blocks = Counter[str]()
        self._xors = Counter[str]()
        for batch in plan:
            self._send(f"{batch.bit:016x}", batch)
        for worker in self.seqs:
            self._digest(worker)

    def _send(self, worker: str, batch: Batch) -> None:
        seq = self.seqs[worker] = self.seqs.get(worker, 0) + 1
        parts = [(kind, hashes) for kind, hashes in ((REMOVED, batch.removed), (STORED, batch.stored)) if hashes]
        ops = pack_ops([Op(kind, DEVICE, array("Q", hashes)) for kind, hashes in parts])
        self.messages.append((NodeId(worker), encode(KvBatch(worker, EPOCH, 0, seq, ops))))
        self._blocks[worker] += len(batch.stored) - len(batch.removed)
        self._xors[worker] ^= xor_all(array("Q", batch.stored + batch.removed))
        if seq % round(DIGEST_S / BATCH_S) == 0:
            self._digest(worker)

    def _digest(self, worker: str) -> None:
        seq = self.seqs[worker]
        digest = KvDigest(worker, EPOCH, 0, seq, seq + 1, self._blocks[worker], self._xors[worker])
        self.messages.append((NodeId(worker), encode(digest)))


class Source:
    """A worker that had nothing cached when it was asked."""

    def __init__(self, worker: str) -> None:
        self.worker = NodeId(worker)

    async def fetch(self, what: str, key: str) -> bytes:
        return pack_snapshot(EPOCH, 0, [])


def ingest(name: str, plan: list[Batch], rounds: int) -> None:
    """Received bytes to the index, as a frontend does it: decoded, numbers checked, a digest for a second's batches."""
    wire = Wire(plan)

    async def receive() -> float:
        waiting, ready = set(wire.seqs), asyncio.Event()

        def placed(key: Key, slot: int | None) -> None:
            waiting.discard(key[0])
            if not waiting:
                ready.set()

        feed = KvFeed(KvIndex(), placed)
        for worker in wire.seqs:
            feed.up(Source(worker), 1)
        await ready.wait()
        start = time.perf_counter()
        for worker, data in wire.messages:
            if not feed.take(worker, data):
                feed.received(worker, decode(EVENTS, data))  # type: ignore[arg-type]
        spent = time.perf_counter() - start
        if {key[0]: (stream.state, stream.seq) for key, stream in feed.streams.items()} != {
            worker: (EXACT, seq) for worker, seq in wire.seqs.items()
        }:
            raise SystemExit(f"{name}: not every stream is exact")
        return spent

    def naive() -> float:
        held: dict[int, int] = {}
        start = time.perf_counter()
        for bit, stored, removed in plan:
            for one in stored:
                held[one] = held.get(one, 0) | bit
            for one in removed:
                left = held.get(one, 0) & ~bit
                if left:
                    held[one] = left
                else:
                    held.pop(one, None)
        return time.perf_counter() - start

    mine, theirs = alternate(lambda: asyncio.run(receive()), naive, rounds)
    changes = sum(len(batch.stored) + len(batch.removed) for batch in plan)
    _print(
        {
            "bench": name,
            "blocks_a_batch": round(statistics.median(len(batch.stored) for batch in plan)),
            "blocks_s": round(changes / mine),
            "naive_blocks_s": round(changes / theirs),
            "ratio": round(theirs / mine, 2),
        }
    )


def naive_hashes(tokens: bytes) -> list[int]:
    size = 4 * BLOCK
    hashes: list[int] = []
    pack = struct.Struct("<QQ").pack
    for end in range(size, len(tokens) + 1, size):
        block = xxh3_64_intdigest(tokens[end - size : end], 1337)
        hashes.append(xxh3_64_intdigest(pack(hashes[-1], block), 1337) if hashes else block)
    return hashes


def naive_match(held: dict[int, int], hashes: list[int], among: int) -> dict[int, int]:
    found: dict[int, int] = {}
    standing = among
    for depth, one in enumerate(hashes):
        now = standing & held.get(one, 0)
        if now != standing:
            lost = standing & ~now
            while lost:
                low = lost & -lost
                found[low.bit_length() - 1] = depth
                lost ^= low
            standing = now
            if not now:
                break
    while standing:
        low = standing & -standing
        found[low.bit_length() - 1] = len(hashes)
        standing ^= low
    return {slot: depth for slot, depth in found.items() if depth}


def decision(length: int, background: int, tiers: int, rounds: int, rng: random.Random) -> None:
    """Hash a prompt and match it among the targets: one holds all of it, the others the system prompt and a little."""
    tokens = array("I", [rng.randrange(150_000) for _ in range(length)]).tobytes()
    hashes = sequence_hashes(tokens, BLOCK)
    if hashes != naive_hashes(tokens):
        raise SystemExit("decision: the hashes differ")
    index = KvIndex()
    held: dict[int, int] = {}
    for target in range(TARGETS):
        slot = index.add()
        depth = len(hashes) if target == 5 else min(len(hashes), SHARED + 4 * target)
        own = hashes[:depth] + [rng.getrandbits(64) for _ in range(background // TARGETS)]
        if tiers > 1:  # the second half of each prefix lies in host memory
            index.store(slot, 1, array("Q", hashes[depth // 2 : depth]))
            index.store(slot, 0, array("Q", own[: depth // 2] + own[depth:]))
        else:
            index.store(slot, 0, array("Q", own))
        for one in own:
            held[one] = held.get(one, 0) | 1 << slot
    among = (1 << TARGETS) - 1
    if index.match(hashes, among).blocks != naive_match(held, hashes, among):
        raise SystemExit("decision: the matches differ")

    def timed(call: Callable[[], object]) -> Side:
        def side() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return side

    both = alternate(
        timed(lambda: index.match(sequence_hashes(tokens, BLOCK), among)),
        timed(lambda: naive_match(held, naive_hashes(tokens), among)),
        rounds,
    )
    alone = alternate(
        timed(lambda: index.match(hashes, among)), timed(lambda: naive_match(held, hashes, among)), rounds
    )
    _print(
        {
            "bench": "kv-decision",
            "tokens": length,
            "targets": TARGETS,
            "tiers": tiers,
            "index_blocks": len(index),
            "us": round(both[0] * 1e6, 1),
            "naive_us": round(both[1] * 1e6, 1),
            "ratio": round(both[0] / both[1], 2),
            "match_us": round(alone[0] * 1e6, 1),
            "naive_match_us": round(alone[1] * 1e6, 1),
            "us_a_block": round(both[0] * 1e6 / len(hashes), 3),
        }
    )


def memory(blocks: int, rng: random.Random) -> None:
    """Bytes a block of an index of that many, over targets each of which shares a tenth with the others."""
    common = [rng.getrandbits(64) for _ in range(blocks // 10)]
    parts = [
        array("Q", [rng.getrandbits(64) for _ in range((blocks - len(common)) // TARGETS)]) for _ in range(TARGETS)
    ]
    gc.collect()
    tracemalloc.start()
    index = KvIndex()
    for part in parts:
        slot = index.add()
        index.store(slot, 0, part)
        index.store(slot, 0, array("Q", [one for one in common if rng.random() < 0.3]))
    gc.collect()
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    bytes(2**22)  # the allocator tidies up what tracemalloc left with the next large block: not the sweep's time
    index.drop(0)
    pauses = []
    done = False
    while not done:
        start = time.perf_counter()
        done = index.sweep()
        pauses.append(time.perf_counter() - start)
    _print(
        {
            "bench": "kv-memory",
            "blocks": len(index),
            "targets": TARGETS,
            "bytes_a_block": round(size / len(index), 1),
            "peak_bytes_a_block": round(peak / len(index), 1),
            "sweep_ms": round(sum(pauses) * 1e3, 1),
            "sweep_longest_ms": round(max(pauses) * 1e3, 2),
        }
    )


def traffic(seconds: int, rng: random.Random) -> None:
    """Bytes published by one worker with a full cache: 5 requests/s of 4096 tokens, half of them cached, that make 256
    tokens each at 100 steps a second. Each subscriber costs as many."""
    rate, new, made = 5.0, 2048 // BLOCK, 256 // BLOCK
    worker = KvJournal("a" * 16, 7, 0, BLOCK)
    capacity = 45_700
    cached: list[int] = []
    sent = batches = changed = serial = 0

    def store(count: int) -> list[KvEvent]:
        nonlocal serial, changed
        ids = tuple(range(serial, serial + count))
        serial += count
        cached.extend(ids)
        tokens = tuple(rng.randrange(150_000) for _ in range(count * BLOCK))
        events: list[KvEvent] = [BlocksStored(ids, None, tokens)]
        if over := cached[: max(0, len(cached) - capacity)]:
            events.append(BlocksRemoved(tuple(over)))
            del cached[: len(over)]
        changed += count + len(over)
        return events

    worker.take(store(capacity))
    changed, start = 0, time.perf_counter()
    for step in range(100 * seconds):
        events = store(new) if rng.random() < rate / 100 else []
        if rng.random() < rate * made / 100:
            events += store(1)
        for batch in worker.take(events):
            sent += len(encode(batch))
            batches += 1
        if step % 100 == 0:
            sent += len(encode(worker.digest()))
    spent = time.perf_counter() - start
    _print(
        {
            "bench": "kv-traffic",
            "requests_s": rate,
            "batches_s": round(batches / seconds, 1),
            "blocks_changed_s": round(changed / seconds, 1),
            "bytes_s": round(sent / seconds),
            "bytes_a_block": round(sent / changed, 2),
            "snapshot_bytes": len(worker.snapshot()),
            "worker_us_a_block": round(spent * 1e6 / changed, 2),
        }
    )


def worker(per_step: int, steps: int, rng: random.Random) -> None:
    """An engine step's events to the bytes of its batch: a request's blocks stored, as many others evicted."""
    lag = 64
    events: list[list[KvEvent]] = []
    for step in range(steps):
        ids = tuple(range(step * per_step, (step + 1) * per_step))
        tokens = tuple(rng.randrange(150_000) for _ in range(per_step * BLOCK))
        events.append([BlocksStored(ids, None, tokens)])
        if step >= lag:
            events[-1].append(BlocksRemoved(tuple(range((step - lag) * per_step, (step - lag + 1) * per_step))))
    rounds = []
    for _ in range(5):
        journal = KvJournal("a" * 16, 7, 0, BLOCK)
        start = time.perf_counter()
        for step_events in events:
            for batch in journal.take(step_events):
                encode(batch)
        rounds.append(time.perf_counter() - start)
    changed = per_step * (2 * steps - lag)
    spent = statistics.median(rounds)
    _print(
        {
            "bench": "kv-worker",
            "blocks_stored_a_step": per_step,
            "blocks_s": round(changed / spent),
            "us_a_block": round(spent * 1e6 / changed, 2),
        }
    )


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="little of each: proves that it runs")
    quick = parser.parse_args().quick
    rng = random.Random(0)
    rounds = 3 if quick else 15
    blocks = 20_000 if quick else 400_000
    for name, plan in (("kv-ingest", churn), ("kv-ingest-stores", sharing)):
        for per_batch in (2, 8, 16, 32, 128, 512):
            ingest(name, plan(blocks, per_batch, rng), rounds)
    ingest("kv-ingest-serving", serving(2 if quick else 30, rng), rounds)
    for length in (1024, PROMPT, 32_768, 100_000):
        decision(length, 10_000 if quick else 500_000, 1, 10 * rounds, rng)
    decision(PROMPT, 10_000 if quick else 500_000, 2, 10 * rounds, rng)
    memory(20_000 if quick else 1_000_000, rng)
    for per_step in (1, 3, 27, 128):
        worker(per_step, 200 if quick else 1000, rng)
    traffic(2 if quick else 60, rng)


if __name__ == "__main__":
    main()
