"""Conversations over HTTP against real processes, one routing policy after the other; one JSON line each.

    python bench/routing_live.py [--policy kv --policy round-robin] [--frontends 1] [--workers 4] [--users 32]

`sim` workers that take the time of their timing model (`--prefill-tps 5000`). Every user holds a conversation: a system
prompt that all share, then in each turn `--new` new tokens and an answer of `--answer` tokens. Turns are due as a
Poisson process at `--load` of capacity. One whose user still waits for an answer waits with it, and TTFT counts from
when the turn was due, else a slow policy would be spared the turns that it delays (`sent_p50_ms`: from when it was
sent). Capacity is what the workers could compute if no prefix were ever found (`--capacity none`), if they were found
as often as a worker chosen at random has them (`random`), or if every one were found (`best`).

`hit_of_best`: cached tokens that the answers' usage reports, over those that one cache of all workers would have had.
`burst_workers`: how many workers computed the prefix that 20 requests shared within 50 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import string
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.nodes import Cluster, NodeProcess, make_key, wait_for

BLOCK = 16
FRAME = 16
"""Tokens of the chat template round the system prompt and before the user's first word."""
BURST, BURST_TOKENS, BURST_S = 20, 4000, 0.05
REQUEST_S = 120.0


@dataclass
class Answer:
    worker: str
    text: str
    prompt: int
    cached: int
    ttft: float
    """Seconds from when it was sent."""
    late: float = 0.0
    """Seconds that it was sent after it was due."""


@dataclass
class User:
    """A conversation; ``known`` is how many tokens of its next prompt a cache of all workers holds."""

    messages: list[dict[str, str]]
    known: int
    turns: int = 0
    answers: list[Answer] = field(default_factory=list)


def words(rng: random.Random, tokens: int) -> str:
    """Text of exactly so many tokens: the byte-level card has one a byte."""
    return "".join(rng.choices(string.ascii_lowercase + " ", k=tokens))


async def chat(url: str, messages: list[dict[str, str]], answer: int) -> Answer:
    """One streamed chat; AssertionError for anything but a whole answer."""
    where = urlsplit(url)
    options = {"max_tokens": answer, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps({"model": "sim", "messages": messages, **options}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=2**24)
    try:
        writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        reply, first = b"", 0.0
        while part := await reader.read(65536):
            reply += part
            if not first and b'"content":"' in reply:
                first = time.perf_counter() - started
    finally:
        writer.close()
    assert reply.startswith(b"HTTP/1.1 200"), reply[:500]
    assert b"data: [DONE]" in reply, reply[-500:]
    worker = reply.partition(b"x-p2pdyn-worker: ")[2].split(b"\r\n")[0].decode()
    events = [json.loads(line[6:]) for line in reply.decode().splitlines() if line.startswith("data: {")]
    text = "".join(c["delta"].get("content") or "" for event in events for c in event["choices"])
    usage = next(event["usage"] for event in reversed(events) if event.get("usage"))
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(worker, text, usage["prompt_tokens"], cached, first)


class Run:
    """One policy's conversations."""

    def __init__(self, urls: list[str], arguments: argparse.Namespace) -> None:
        self.urls, self.arguments = urls, arguments
        self.rng = random.Random(arguments.seed)
        self.answers: list[Answer] = []
        self.best = 0
        self.turn = 0

    async def conversations(self, rate: float) -> None:
        given = self.arguments
        system = words(self.rng, given.system)
        for _ in range(given.rounds):
            idle: asyncio.Queue[User] = asyncio.Queue()
            for _ in range(given.users):
                idle.put_nowait(User([{"role": "system", "content": system}], 0))
            tasks: list[asyncio.Task[None]] = []
            due = time.perf_counter()
            for _ in range(given.users * given.turns):
                due += self.rng.expovariate(rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                user = await asyncio.wait_for(self._any(idle), REQUEST_S)
                tasks.append(asyncio.create_task(self._turn(user, words(self.rng, given.new), idle, due)))
            await asyncio.gather(*tasks)

    async def _any(self, idle: asyncio.Queue[User]) -> User:
        """One at random of those with the fewest turns so far: in order of arrival, users would come round to the same
        worker of a round-robin, and with all at random few would be left in the end, to wait for their own answers."""
        users = [await idle.get()]
        while not idle.empty():
            users.append(idle.get_nowait())
        fewest = min(user.turns for user in users)
        chosen = users.pop(self.rng.choice([at for at, user in enumerate(users) if user.turns == fewest]))
        for user in users:
            idle.put_nowait(user)
        return chosen

    async def _turn(self, user: User, text: str, idle: asyncio.Queue[User], due: float) -> None:
        given = self.arguments
        late = max(0.0, time.perf_counter() - due)
        user.messages.append({"role": "user", "content": text})
        self.turn += 1
        known = user.known or (given.system + FRAME if self.turn > 1 else 0)
        url = self.urls[self.turn % len(self.urls)]
        answer = await asyncio.wait_for(chat(url, user.messages, given.answer), REQUEST_S)
        answer.late = late
        user.messages.append({"role": "assistant", "content": answer.text})
        self.best += min(known, answer.prompt - 1) // BLOCK * BLOCK
        user.known = answer.prompt + given.answer - 1
        user.turns += 1
        self.answers.append(answer)
        if user.turns < given.turns:
            idle.put_nowait(user)

    async def burst(self) -> int:
        """Siblings that share a new prefix, all within 50 ms; the number of workers that took any."""
        shared = words(self.rng, BURST_TOKENS)

        async def one(delay: float, tail: str) -> Answer:
            await asyncio.sleep(delay)
            url = self.urls[int(delay * 1e6) % len(self.urls)]
            return await chat(url, [{"role": "user", "content": shared + tail}], 4)

        siblings = [one(self.rng.uniform(0, BURST_S), words(self.rng, 50)) for _ in range(BURST)]
        answers = await asyncio.wait_for(asyncio.gather(*siblings), REQUEST_S)
        return len({answer.worker for answer in answers})


def capacity(arguments: argparse.Namespace) -> float:
    """Turns a second that the workers could compute."""
    given, rng = arguments, random.Random(0)
    computed, turns = 0.0, 0
    for _ in range(1000):
        held = [given.system + FRAME] * given.workers
        for turn in range(given.turns):
            prompt = given.system + FRAME + (turn + 1) * (given.new + FRAME) + turn * given.answer
            worker = rng.randrange(given.workers) if given.capacity == "random" else 0
            computed += prompt - (held[worker] // BLOCK * BLOCK if given.capacity != "none" else 0)
            held[worker] = prompt + given.answer
            turns += 1
    return given.workers * float(given.prefill_tps) / (computed / turns)


def measure(policy: str, arguments: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), make_key(Path(folder))) as cluster:
        fronts = [cluster.frontend("f0", "--router", policy)]
        for number in range(1, arguments.frontends):
            fronts.append(cluster.frontend(f"f{number}", "--router", policy, seeds=fronts[:1]))
        engine = ("--", "--prefill-tps", str(arguments.prefill_tps), "--kv-blocks", str(arguments.kv_blocks))
        for number in range(arguments.workers):
            cluster.worker(f"w{number}", *engine, seeds=fronts[:1])
        wait_for(lambda: all(_ready(cluster, front) for front in fronts), 20, "all peers ready", every=0.2)
        rate = arguments.load * capacity(arguments)
        run = Run([front.url for front in fronts], arguments)
        started = time.perf_counter()
        asyncio.run(run.conversations(rate))
        seconds = time.perf_counter() - started
        workers = asyncio.run(run.burst())
    return {"policy": policy, **_summary(run, seconds, rate), "burst_workers": workers}


def _ready(cluster: Cluster, front: NodeProcess) -> bool:
    peers = front.peers(cluster.key)["peers"]
    return sum(peer["state"] == "ready" for peer in peers) == len(cluster.nodes)


def _summary(run: Run, seconds: float, rate: float) -> dict[str, object]:
    cuts = statistics.quantiles([(answer.late + answer.ttft) * 1e3 for answer in run.answers], n=100)
    sent = statistics.median(answer.ttft * 1e3 for answer in run.answers)
    prompt = sum(answer.prompt for answer in run.answers)
    cached = sum(answer.cached for answer in run.answers)
    share = dict.fromkeys({answer.worker for answer in run.answers}, 0)
    for answer in run.answers:
        share[answer.worker] += answer.prompt - answer.cached
    return {
        "turns": len(run.answers),
        "turns_s": round(len(run.answers) / seconds, 2),
        "offered_s": round(rate, 2),
        "hit_rate": round(cached / prompt, 4),
        "best_rate": round(run.best / prompt, 4),
        "hit_of_best": round(cached / run.best, 4),
        "ttft_p50_ms": round(cuts[49], 1),
        "ttft_p90_ms": round(cuts[89], 1),
        "ttft_p99_ms": round(cuts[98], 1),
        "sent_p50_ms": round(sent, 1),
        "computed_imbalance": round(max(share.values()) / statistics.mean(share.values()), 3),
    }


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", action="append", help="several: one after the other [kv, round-robin]")
    parser.add_argument("--frontends", type=int, default=1, help="turns go to them in turn")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--users", type=int, default=32)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1, help="with new users each")
    parser.add_argument("--system", type=int, default=1000, help="tokens of the shared system prompt")
    parser.add_argument("--new", type=int, default=1500, help="new tokens a turn")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each answer")
    parser.add_argument("--prefill-tps", type=float, default=5000.0)
    parser.add_argument("--kv-blocks", type=int, default=8192)
    parser.add_argument("--load", type=float, default=0.6, help="of capacity")
    parser.add_argument("--capacity", choices=["none", "random", "best"], default="best")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    arguments.policy = arguments.policy or ["kv", "round-robin"]
    return arguments


def main() -> None:
    arguments = parse()
    under = {k: v for k, v in vars(arguments).items() if k != "policy"}
    for policy in arguments.policy:
        print(json.dumps({"bench": "routing_live", **measure(policy, arguments), "under": under}), flush=True)


if __name__ == "__main__":
    main()
