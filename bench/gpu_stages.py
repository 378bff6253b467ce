"""The stages of gpu.py. Each starts its servers, measures, and returns what its JSON line says."""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_client as client
import gpu_model as models
from gpu_client import Load
from gpu_engines import Engine, Need
from gpu_side import BenchError, Server, Servers, get, say, until

ALWAYS_REMOTE = "import p2pdyn.core.disagg as d; d.OVERHEAD_S = -1e9; from p2pdyn.cli.main import main; main()"
"""A frontend for which moving KV costs nothing, so that it has each prompt of more than a block computed elsewhere."""
NEWS = re.compile(r"prefix cache: (\d+) tokens asked, (\d+) found; from other workers: (\d+) asked, (\d+) brought")
NEWS_S = 25.0
"""A worker logs the engine's counters at most each 10 s."""
TOPS = 2
OWN = "own"
"""The engine's own server, in what stages tell."""


@dataclass(frozen=True)
class Plan:
    """What was asked for, and sizes that fit it."""

    folder: Path
    engine: Engine
    shape: str
    exact_shape: str
    exact_dtype: str
    cpu: bool
    gpus: int
    pairs: int
    requests: int
    load: Load
    exact_prompts: tuple[int, ...]
    ttft_prompts: tuple[int, ...]
    repeats: int
    start_s: float
    eager: bool
    subject: str
    limit_s: float
    """Of the stage that runs."""

    def flags(self, shape: str, kv_gib: int, share: float, *, dummy: bool = True, exact: bool = False) -> list[str]:
        """The engine's, the same for each server of a stage. ``exact``: one sequence at a time, no CUDA graphs, and a
        dtype in which two ways to compute the same differ little."""
        dtype = self.exact_dtype if exact else "float32" if self.cpu else "bfloat16"
        streams = 1 if exact else max(4, self.load.streams * 2)
        eager = self.eager or exact
        return self.engine.flags(Need(models.SHAPES[shape], streams, kv_gib, share, dtype, dummy, eager))

    def model(self, shape: str, *, weights: bool) -> Path:
        return models.write(self.folder / f"{shape}{'-weights' * weights}", models.SHAPES[shape], weights=weights)

    def gpu(self, number: int) -> dict[str, str]:
        return {} if self.cpu else {"CUDA_VISIBLE_DEVICES": str(number % self.gpus)}


# ---- overhead


def overhead(plan: Plan, servers: Servers) -> dict[str, Any]:
    """p2pdyn's endpoint and worker in one node beside the engine's own server, both up, one loaded at a time."""
    model = plan.model(plan.shape, weights=False)
    flags = plan.flags(plan.shape, 8, 0.42)
    sides = {
        OWN: servers.own(plan.engine, model, flags, plan.gpu(0)),
        "p2pdyn": _serving(plan, servers, "p2pdyn", model, flags),
    }
    _wait(plan, servers, list(sides.values()))
    load, count = plan.load, plan.requests
    warm = {name: client.run(client.closed(side.url, load, count, 1), 240) for name, side in sides.items()}
    prompts = {name: statistics.mean(reply.prompt for reply in replies) for name, (_, replies) in warm.items()}
    rate = 0.6 * client.run(client.closed(sides[OWN].url, load, count, 2), 240)[0] / load.tokens
    say(f"60 % of capacity is {rate:.2f} requests a second")
    rows: list[dict[str, Any]] = []
    for pair in range(plan.pairs):
        order = list(sides) if pair % 2 == 0 else list(reversed(sides))
        row = {name: _one_pair(plan, sides[name], rate, 100 + pair) for name in order}
        say(f"pair {pair + 1} of {plan.pairs}: {row}")
        rows.append(row)
    ratios = [row["p2pdyn"]["tok_s"] / row[OWN]["tok_s"] for row in rows]
    closer = [row["p2pdyn"]["ttft_p50_ms"] - row[OWN]["ttft_p50_ms"] for row in rows]
    hot = Load(load.prompt, load.tokens, load.streams, temperature=0.8)
    sampled = [
        {
            name: round(client.run(client.closed(side.url, hot, count, 500 + i), 240)[0], 1)
            for name, side in sides.items()
        }
        for i in range(3)
    ]
    return {
        "shape": plan.shape,
        "streams": load.streams,
        "prompt_tokens": prompts,
        "output_tokens": load.tokens,
        "requests": count,
        "rate_req_s": round(rate, 2),
        "start_s": {name: round(side.start_s, 1) for name, side in sides.items()},
        "tok_s": {name: round(statistics.median(row[name]["tok_s"] for row in rows), 1) for name in sides},
        "itl_p50_ms": {name: round(statistics.median(row[name]["itl_p50_ms"] for row in rows), 2) for name in sides},
        "ttft_p50_ms": {name: round(statistics.median(row[name]["ttft_p50_ms"] for row in rows), 2) for name in sides},
        "throughput_ratio": client.interval(ratios),
        "ttft_p50_difference_ms": client.interval(closer, 3),
        "sampled_tok_s": sampled,
        "sampled_ratio": round(statistics.median(one["p2pdyn"] / one[OWN] for one in sampled), 4),
        "pairs": rows,
    }


def _one_pair(plan: Plan, side: Server, rate: float, seed: int) -> dict[str, float]:
    tok_s, loaded = client.run(client.closed(side.url, plan.load, plan.requests, seed), 240)
    replies = client.run(client.paced(side.url, plan.load, rate, plan.requests // 2, 1000 + seed), 240)
    ttfts = [reply.ttft for reply in replies]
    p90 = round(statistics.quantiles(ttfts, n=10)[8] * 1e3, 2)
    itl = client.median_ms([(reply.end - reply.ttft) / (reply.tokens - 1) for reply in loaded])
    return {"tok_s": round(tok_s, 1), "itl_p50_ms": itl, "ttft_p50_ms": client.median_ms(ttfts), "ttft_p90_ms": p90}


# ---- routing


def routing(plan: Plan, servers: Servers) -> dict[str, Any]:
    """Two workers: each conversation's second turn goes where its first one was computed."""
    model = plan.model(plan.exact_shape, weights=True)
    flags = plan.flags(plan.exact_shape, 4, 0.40, dummy=False)
    front = servers.node("front", *servers.key(), "--engine", "none", "--http", "127.0.0.1:0")
    servers.wait([front], 60)
    workers = [_worker(plan, servers, f"worker{i}", front, model, flags, plan.gpu(0)) for i in range(2)]
    _wait(plan, servers, workers)
    _seen(front, workers)
    rng = random.Random(3)
    turns = []
    for _ in range(6):
        messages = [{"role": "user", "content": client.text(rng, 600)}]
        before = _blocks(front)
        first = _chat(front, messages)
        held = first["usage"]["prompt_tokens"]
        _indexed(front, before + held // plan.engine.block)
        messages += [{"role": "assistant", "content": first["text"]}, {"role": "user", "content": client.text(rng, 20)}]
        second = _chat(front, messages)
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
        turns.append(
            {"same": first["worker"] == second["worker"], "first": held, "cached": cached, "worker": first["worker"]}
        )
    found = {}
    for worker in workers:
        cached = sum(turn["cached"] for turn in turns if turn["worker"] in (worker.id, worker.name))
        found[worker.name] = _news(plan, worker, "found", cached)
    peers = get(f"{front.url}/p2p/peers")["peers"]
    return {
        "shape": plan.exact_shape,
        "start_s": [round(worker.start_s, 1) for worker in workers],
        "conversations": len(turns),
        "second_turn_with_the_prefix": sum(turn["same"] for turn in turns),
        "workers_used": len({turn["worker"] for turn in turns}),
        "first_turn_tokens": [turn["first"] for turn in turns],
        "second_turn_cached": [turn["cached"] for turn in turns],
        **({"engine_counters": found} if plan.engine.counters else {}),
        "streams": {peer["name"]: peer["kv"]["stream"] for peer in peers if peer["engine"] == plan.engine.name},
    }


def _chat(front: Server, messages: list[dict[str, str]]) -> dict[str, Any]:
    asked = {"model": "m", "messages": messages, "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    answer = get(f"{front.url}/v1/chat/completions", asked, 120)
    return {"text": answer["choices"][0]["message"]["content"], "usage": answer["usage"], "worker": _by(answer)}


def _by(answer: dict[str, Any]) -> str:
    workers = answer["p2pdyn"]["workers"]
    return str(workers[0])


def _blocks(front: Server) -> int:
    return sum(int(peer["kv"]["blocks"]) for peer in get(f"{front.url}/p2p/peers")["peers"])


def _indexed(front: Server, blocks: int) -> None:
    until(lambda: _blocks(front) >= blocks, 20, f"{blocks} blocks in the frontend's index")


# ---- prefill and decode


@contextmanager
def _pd(plan: Plan, servers: Servers, model: Path, flags: list[str]) -> Iterator[tuple[Server, Server, Server, Server]]:
    """An aggregated worker of its own; a prefill and a decode worker with a frontend that always hands over, and one
    that decides: (aggregated, always, decides, decode)."""
    key = servers.key()
    alone = _serving(plan, servers, "aggregated", model, flags, *key, "--cluster", "alone")
    always = servers.node("always", *key, "--engine", "none", "--http", "127.0.0.1:0", program=("-c", ALWAYS_REMOTE))
    servers.wait([always], 60)
    decides = servers.node("decides", *key, "--engine", "none", "--http", "127.0.0.1:0", "--seed", always.mesh)
    prefill = _worker(plan, servers, "prefill", always, model, flags, plan.gpu(0), "--role", "prefill")
    decode = _worker(plan, servers, "decode", always, model, flags, plan.gpu(1), "--role", "decode")
    _wait(plan, servers, [alone, decides, prefill, decode])
    for front in (always, decides):
        _seen(front, [prefill, decode])
    for front in (alone, always):  # connections, kernels
        get(f"{front.url}/v1/completions", client.body(client.ids(random.Random(0), 300, 259), 4), 120)
    yield alone, always, decides, decode


def pd(plan: Plan, servers: Servers) -> dict[str, Any]:
    """Greedy tokens of prefill and decode on two workers against one aggregated worker's."""
    model = plan.model(plan.exact_shape, weights=True)
    flags = plan.flags(plan.exact_shape, 4, 0.28, dummy=False, exact=True)
    rng = random.Random(5)
    prompts = [client.ids(rng, size, models.SHAPES[plan.exact_shape].vocabulary) for size in plan.exact_prompts]
    with _pd(plan, servers, model, flags) as (alone, always, _, decode):
        asked = [client.body(prompt, 64, logprobs=TOPS) for prompt in prompts]
        one = [_tokens(alone, body) for body in asked]
        two = [_tokens(always, body) for body in asked]
        lengths = sum(plan.exact_prompts)
        news = _news(plan, decode, "external_asked", lengths)
    differ = [_difference(*both) for both in zip(one, two, strict=True)]
    return {
        "shape": plan.exact_shape,
        "gpus": plan.gpus,
        "dtype": plan.exact_dtype,
        "prompt_tokens": list(plan.exact_prompts),
        "output_tokens": 64,
        "identical": sum(found is None for found in differ),
        "of": len(differ),
        "differences": [found for found in differ if found is not None],
        "distinct_tokens": [len(set(row[0])) for row in one],
        "decode_cached_tokens": [row[2] for row in two],
        **_brought(news),
    }


def pd_ttft(plan: Plan, servers: Servers) -> dict[str, Any]:
    """Time to first token of an idle server: aggregated, and computed elsewhere and pulled."""
    model = plan.model(plan.shape, weights=False)
    flags = plan.flags(plan.shape, 4, 0.30)
    vocabulary = models.SHAPES[plan.shape].vocabulary
    rng = random.Random(9)
    rows = []
    with _pd(plan, servers, model, flags) as (alone, always, decides, decode):
        for size in plan.ttft_prompts:
            times: dict[str, list[float]] = {"aggregated": [], "prefill_decode": []}
            for _ in range(plan.repeats + 1):
                for name, side in zip(times, (alone, always), strict=True):
                    asked = client.body(client.ids(rng, size, vocabulary), 2)
                    times[name].append(client.run(client.stream(side.url, asked), 120).ttft)
            told = get(f"{decides.url}/p2p/explain", client.body(client.ids(rng, size, vocabulary), 2))["prefill"]
            ms = {name: client.median_ms(values[1:]) for name, values in times.items()}
            rows.append({"prompt_tokens": size, "ttft_p50_ms": ms, "first_ms": _firsts(times), "router": told})
            say(str(rows[-1]))
        news = _news(plan, decode, "external_asked", sum(plan.ttft_prompts) * (plan.repeats + 1))
    return {"shape": plan.shape, "gpus": plan.gpus, "ttft": rows, **_brought(news)}


def _firsts(times: dict[str, list[float]]) -> dict[str, float]:
    """The first of a size is not in the medians: kernels are chosen and built then."""
    return {name: round(values[0] * 1e3, 3) for name, values in times.items()}


def _tokens(side: Server, asked: dict[str, Any]) -> tuple[list[str], list[dict[str, float]], int]:
    """Each token's text (its name, see gpu_model.tokenizer), its likeliest ones, and how much was found cached."""
    answer = get(f"{side.url}/v1/completions", asked, 180)
    found, cached = answer["choices"][0]["logprobs"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return found["tokens"], found["top_logprobs"], cached


def _difference(one: tuple[list[str], Any, int], two: tuple[list[str], Any, int]) -> dict[str, Any] | None:
    """Where the tokens part, and how far apart the aggregated worker's two likeliest were there."""
    if one[0] == two[0]:
        return None
    where = next(i for i, (a, b) in enumerate(zip(one[0], two[0], strict=True)) if a != b)
    best = sorted(one[1][where].values(), reverse=True)
    gap = best[0] - best[1] if len(best) > 1 else 0.0
    return {"position": where, "aggregated_top2_gap": round(gap, 6)}


# ---- parts


def _engine(plan: Plan, model: Path) -> list[str]:
    return ["--engine", plan.engine.name, "--model", str(model), "--served-model-name", "m"]


def _serving(plan: Plan, servers: Servers, name: str, model: Path, flags: list[str], *more: str) -> Server:
    """A node that is endpoint and worker."""
    options = (*more, *_engine(plan, model), "--http", "127.0.0.1:0")
    return servers.node(name, *options, flags=[*plan.engine.only_worker, *flags], env=plan.gpu(0))


def _worker(
    plan: Plan,
    servers: Servers,
    name: str,
    front: Server,
    model: Path,
    flags: list[str],
    env: dict[str, str],
    *more: str,
) -> Server:
    join = [*servers.key(), "--seed", front.mesh, "--no-http"]
    return servers.node(name, *join, *_engine(plan, model), *more, flags=[*plan.engine.only_worker, *flags], env=env)


def _wait(plan: Plan, servers: Servers, waiting: list[Server]) -> None:
    """Until all serve; one that could not start beside another is told of by its last error."""
    servers.wait(waiting, plan.start_s)
    say(", ".join(f"{server.name} up after {server.start_s:.0f} s" for server in waiting))


def _seen(front: Server, workers: Sequence[Server]) -> None:
    def ready() -> bool:
        peers = {peer["name"]: peer for peer in get(f"{front.url}/p2p/peers")["peers"]}
        return all(peers.get(worker.name, {}).get("state") == "ready" for worker in workers)

    until(ready, 30, f"{front.name} sees {', '.join(worker.name for worker in workers)}")


def _news(plan: Plan, worker: Server, name: str, least: int) -> dict[str, int] | None:
    """The engine's own prefix cache counters, as the worker has logged them; the last ones if ``name`` never is
    ``least``. None for an engine without."""
    if not plan.engine.counters:
        return None

    def told() -> dict[str, int]:
        found = NEWS.findall(worker.text())
        names = ("asked", "found", "external_asked", "external_found")
        return dict(zip(names, map(int, found[-1]), strict=True)) if found else dict.fromkeys(names, 0)

    try:
        until(lambda: told()[name] >= least, NEWS_S, f"{least} tokens {name} in the engine's counters")
    except BenchError as error:
        say(f"{worker.name}: {error}")
    return told()


def _brought(news: dict[str, int] | None) -> dict[str, Any]:
    if news is None:
        return {}
    rate = news["external_found"] / max(1, news["external_asked"])
    return {"engine_counters": news, "external_hit_rate": round(rate, 4)}


MEASURED = {"overhead": overhead, "routing": routing, "pd": pd, "pd-ttft": pd_ttft}
"""Stages by name; the one more is gpu_conformance's."""
