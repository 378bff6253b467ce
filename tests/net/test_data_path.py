"""Frontend and workers over real sockets in one loop: tokens, cancel, loss, cards; the `sim` engine behind them."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from p2pdyn.core.flight_parts import Action
from p2pdyn.core.request import Job, Logprobs, Outcome, Rejected
from p2pdyn.core.types import READY, Address, Load, NodeId, PeerInfo, SamplingParams, ServedModel
from p2pdyn.engines.base import EngineInfo, EngineOptions, Output
from p2pdyn.engines.base import Sequence as EngineSequence
from p2pdyn.engines.runner import InProcessRunner, Runner, make_runner
from p2pdyn.engines.sim import SimEngine
from p2pdyn.net.curve import Security, write_key_file
from p2pdyn.net.dispatch import Dispatcher
from p2pdyn.net.sockets import Sockets
from p2pdyn.net.worker import WorkerService
from p2pdyn.text.card import ModelCard

LOCAL = Address("127.0.0.1", 0)
FRONTEND = NodeId("f" * 16)


class Sink:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.routed: list[NodeId] = []
        self.outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()

    def on_routed(self, worker: NodeId) -> None:
        self.routed.append(worker)

    def on_tokens(self, tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
        self.tokens += tokens

    def on_end(self, outcome: Outcome) -> None:
        self.outcome.set_result(outcome)


class Worker:
    """A worker service with its engine; ``epoch`` distinguishes incarnations at one address."""

    def __init__(self, sockets: Sockets, node: NodeId, epoch: int, tmp: Path, args: Sequence[str]) -> None:
        self.node, self.epoch, self.tmp, self.args = node, epoch, tmp, args
        self.service = WorkerService(sockets, node, epoch, [LOCAL], [LOCAL])
        self.runner: Runner
        self.info: EngineInfo

    async def serve(self) -> Worker:
        options = EngineOptions(None, "m", self.args, True, self.tmp)
        self.runner = make_runner("sim", options, self.service.on_step, self.service.engine_died)
        self.info = await self.runner.start(lambda fraction, what: None)
        self.service.serve(self.runner, self.info, ["m"], self.digest)
        return self

    @property
    def digest(self) -> str:
        return ModelCard.unpack(self.info.card).digest

    @property
    def peer(self) -> tuple[NodeId, int, Address, PeerInfo]:
        served = ServedModel("m", self.digest, "fp", self.info.block_size, self.info.context)
        info = PeerInfo(
            "w", "0", "aggregated", "sim", state=READY, models=(served,),
            requests_port=self.service.requests_port, events_port=self.service.events_port,
        )  # fmt: skip
        return self.node, self.epoch, Address("127.0.0.1", 1), info

    async def close(self) -> None:
        self.service.close()
        await self.runner.close()


class Bench:
    """One frontend and its workers."""

    def __init__(self, tmp: Path, policy: str = "round-robin") -> None:
        self.tmp = tmp
        write_key_file(tmp / "key")
        self.sockets = Sockets(Security.load(tmp / "key"))
        self.suspects: list[NodeId] = []
        self.workers: list[Worker] = []
        self.batches = 0
        self.dispatcher = Dispatcher(
            self.sockets, FRONTEND, 1, policy, random.Random(1),
            eager=True, suspect=self.suspects.append, report=dict, mesh_metrics=list,
        )  # fmt: skip
        self.dispatcher.on_batch = self.count_batch

    def count_batch(self) -> None:
        self.batches += 1

    async def worker(self, letter: str, *args: str, epoch: int = 7) -> Worker:
        worker = Worker(self.sockets, NodeId(letter * 16), epoch, self.tmp, args or ("--speedup", "0"))
        self.workers.append(await worker.serve())
        return worker

    def refresh(self, *workers: Worker) -> None:
        self.dispatcher.refresh([worker.peer for worker in workers or self.workers])

    def submit(self, max_tokens: int = 8, **more: Any) -> tuple[int, Sink]:
        sink = Sink()
        tokens = array("I", list(b"a question that fills more than one block"))
        job = Job("m", tokens, SamplingParams(max_tokens=max_tokens, temperature=0.0), **more)
        return self.dispatcher.submit(job, sink), sink

    async def close(self) -> None:
        self.dispatcher.close()
        for worker in self.workers:
            await worker.close()
        self.sockets.close()


@contextmanager
def running(tmp: Path, policy: str = "round-robin") -> Iterator[Callable[[Callable[[Bench], Awaitable[None]]], None]]:
    def run(scenario: Callable[[Bench], Awaitable[None]]) -> None:
        async def main() -> None:
            bench = Bench(tmp, policy)
            try:
                await asyncio.wait_for(scenario(bench), 20)
            finally:
                await bench.close()

        asyncio.run(main())

    yield run


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[Callable[[Bench], Awaitable[None]]], None]]:
    with running(tmp_path) as runner:
        yield runner


Run = Callable[[Callable[[Bench], Awaitable[None]]], None]


async def until(condition: Callable[[], Any], what: str, within: float = 5.0) -> None:
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"not within {within:g} s: {what}"
        await asyncio.sleep(0.005)


def test_tokens_flow_and_are_the_same_from_every_worker(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.worker("a")
        await bench.worker("b")
        bench.refresh()
        await until(lambda: all(link.up for link in bench.dispatcher._links.values()), "both links")
        sinks = [bench.submit(max_tokens=32)[1] for _ in range(16)]
        outcomes = [await sink.outcome for sink in sinks]
        assert {outcome.finish for outcome in outcomes} == {"length"}
        assert len({tuple(sink.tokens) for sink in sinks}) == 1
        assert len(sinks[0].tokens) == 32
        assert {outcome.workers for outcome in outcomes} == {(w.node,) for w in bench.workers}
        assert bench.batches
        assert all(worker.service.open == 0 for worker in bench.workers)

    run(scenario)


@pytest.mark.alone
def test_fast_steps_share_a_message_but_neither_the_first_token_nor_the_end_waits(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2pdyn.net.worker.STEPS_S", 60.0)

    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a")
        worker.service._sent = float("-inf")  # the last message is long ago
        bench.refresh()
        arrived: list[int] = []
        _, sink = bench.submit(max_tokens=64)
        take = sink.on_tokens

        def on_tokens(tokens: Sequence[int], logprobs: Logprobs, cached: int) -> None:
            arrived.append(len(tokens))
            take(tokens, logprobs, cached)

        sink.on_tokens = on_tokens  # type: ignore[method-assign]
        await asyncio.wait_for(sink.outcome, 5)
        assert arrived[0] == 1
        assert sum(arrived) == len(sink.tokens) == 64
        assert len(arrived) < 8  # two, and one for each quarter of a second that it took
        assert worker.runner.steps == 64

    run(scenario)


def test_a_workers_queue_is_what_the_router_expects_it_to_compute(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a", "--prefill-tps", "100", "--max-num-seqs", "1")
        bench.refresh()
        _, sink = bench.submit(max_tokens=1)
        await asyncio.wait_for(sink.outcome, 5)
        await until(lambda: len(bench.dispatcher.index) == 2, "the prompt's two blocks are known")
        sinks = [bench.submit(max_tokens=1)[1] for _ in range(3)]
        reports: list[Load] = []
        take = bench.dispatcher.flights.report

        def report(worker: NodeId, rank: int, load: Load, now: float) -> list[Action]:
            reports.append(load)
            return take(worker, rank, load, now)

        bench.dispatcher.flights.report = report  # type: ignore[method-assign]
        await until(lambda: any(load.active_requests + load.queued == 3 for load in reports), "a report of all three")
        assert 0 < max(load.prefill_tokens_queued for load in reports) <= 3 * (41 - 32)
        assert worker.service.load.prefill_tokens_queued > 41  # its engine looks a prompt up when its turn comes
        for sink in sinks:
            await asyncio.wait_for(sink.outcome, 5)

    with running(tmp_path, "kv") as run:
        run(scenario)


def test_a_cancel_reaches_the_engine_within_one_step(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a", "--itl-ms", "20")
        bench.refresh()
        ticket, sink = bench.submit(max_tokens=1000)
        await until(lambda: sink.tokens, "the first token")
        bench.dispatcher.cancel(ticket)
        await until(lambda: not worker.runner.has_work, "an idle engine", within=0.5)
        steps, seen = worker.runner.steps, len(sink.tokens)
        await asyncio.sleep(0.1)
        assert worker.runner.steps == steps
        assert len(sink.tokens) == seen
        assert not sink.outcome.done()
        assert not bench.dispatcher.flights.open

    run(scenario)


def test_a_cancel_right_behind_its_generate_wins(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a", "--itl-ms", "20")
        bench.refresh()
        _, first = bench.submit(max_tokens=1)
        await first.outcome
        steps = worker.runner.steps
        for _ in range(50):
            ticket, _ = bench.submit(max_tokens=1000)
            bench.dispatcher.cancel(ticket)
        await until(lambda: worker.service.requests_total == 51, "all generates received")
        await until(lambda: worker.service.open == 0, "all cancelled")
        assert worker.runner.steps == steps, "a cancelled request reached the engine"

    run(scenario)


def test_a_closed_worker_is_left_at_once_and_the_stream_goes_on_exactly(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for letter in "ab":
            await bench.worker(letter, "--itl-ms", "5")
        bench.refresh()
        _, whole = bench.submit(max_tokens=80)
        await whole.outcome
        _, sink = bench.submit(max_tokens=80)
        await until(lambda: len(sink.tokens) > 10, "a part of the stream")
        victim = next(w for w in bench.workers if w.node == sink.routed[0])
        victim.service.close()
        outcome = await asyncio.wait_for(sink.outcome, 3)
        assert outcome.migrations == 1
        assert outcome.workers[0] == victim.node != outcome.workers[1]
        assert sink.tokens == whole.tokens
        assert bench.suspects == [victim.node]

    run(scenario)


@pytest.mark.alone
def test_a_silent_worker_is_left_after_a_second(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for letter in "ab":
            await bench.worker(letter, "--itl-ms", "5")
        bench.refresh()
        _, sink = bench.submit(max_tokens=300)
        await until(lambda: sink.tokens, "the first token")
        victim = next(w for w in bench.workers if w.node == sink.routed[0])
        # Frozen as a process would be: the sockets stay open, nothing is read or sent.
        victim.service._timer.cancel()
        victim.service._send = lambda connection, data: None  # type: ignore[method-assign]
        frozen_at = asyncio.get_running_loop().time()
        await until(lambda: len(sink.routed) == 2, "another worker")
        assert asyncio.get_running_loop().time() - frozen_at < 1.6
        assert (await sink.outcome).migrations == 1

    run(scenario)


def test_an_engine_that_stands_still_loses_its_streams_and_takes_no_new_ones(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        for letter in "ab":
            await bench.worker(letter, "--itl-ms", "5")
        bench.refresh()
        _, whole = bench.submit(max_tokens=80)
        await whole.outcome
        _, sink = bench.submit(max_tokens=80)
        await until(lambda: len(sink.tokens) > 10, "a part of the stream")
        victim = next(w for w in bench.workers if w.node == sink.routed[0])
        other = next(w for w in bench.workers if w is not victim)
        victim.service.stall("no engine step for 15 s with requests open")
        assert victim.service.open == 0
        assert victim.runner.has_work, "the engine is told nothing until it steps"
        outcome = await sink.outcome
        assert (outcome.workers, outcome.migrations) == ((victim.node, other.node), 1)
        assert sink.tokens == whole.tokens
        bench.refresh()  # gossip does not say so yet
        for _ in range(2):
            _, late = bench.submit(max_tokens=4)
            assert (await late.outcome).workers[-1] == other.node
        assert not bench.dispatcher.flights.trials.blame._deaths
        victim.service.resume()
        bench.refresh()
        _, pinned = bench.submit(pin=victim.node)
        assert (await pinned.outcome).migrations == 0
        await until(lambda: not victim.runner.has_work, "nothing is left of what it had")

    run(scenario)


def test_a_frontend_that_stood_still_trusts_a_link_once_its_worker_answers(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.worker("a", "--itl-ms", "5")
        bench.refresh()
        _, first = bench.submit(max_tokens=1)
        await first.outcome
        dispatcher = bench.dispatcher
        _, sink = bench.submit(max_tokens=100)
        await until(lambda: sink.tokens, "the first token")
        time.sleep(1.6)  # noqa: ASYNC251 - longer than STREAM_SILENCE_S: the whole process stands still, loop and all
        _, late = bench.submit(max_tokens=1)
        outcome = await sink.outcome
        assert (outcome.migrations, dispatcher.links_lost) == (0, 0)
        assert (await late.outcome).migrations == 0

        dispatcher._ticked -= 5.0
        dispatcher._absence(asyncio.get_running_loop().time())
        dispatcher._listen(asyncio.get_running_loop().time())
        _, held = bench.submit(max_tokens=1)
        assert not held.routed, "what was heard before proves nothing"
        assert (await held.outcome).finish == "length"

    run(scenario)


def test_a_restarted_worker_refuses_its_predecessors_requests(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        old = await bench.worker("a", "--itl-ms", "20")
        bench.refresh()
        _, sink = bench.submit(max_tokens=200)
        await until(lambda: sink.tokens, "the first token")
        new = await bench.worker("a", "--speedup", "0", epoch=8)
        bench.refresh(new)
        outcome = await sink.outcome
        assert outcome.migrations == 1
        assert len(sink.tokens) == 200
        await until(lambda: old.service.open == 0, "the old one to be told")

    run(scenario)


def test_a_worker_whose_epoch_rises_goes_on_serving(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a", "--itl-ms", "5")
        bench.refresh()
        _, whole = bench.submit(max_tokens=60)
        await whole.outcome
        _, sink = bench.submit(max_tokens=60)
        await until(lambda: len(sink.tokens) > 5, "a part of the stream")
        worker.epoch += 2
        worker.service.set_epoch(worker.epoch)
        bench.refresh()
        assert (await sink.outcome).finish == "length"
        assert sink.tokens == whole.tokens
        _, after = bench.submit(max_tokens=4)
        assert (await after.outcome).migrations == 0
        await until(lambda: worker.service.open == 0, "nothing is left of the old links' requests")

    run(scenario)


def test_the_clients_trace_reaches_the_engine_and_the_workers_log(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"

    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a")
        bench.refresh()
        submit, seen = worker.runner.submit, list[str]()

        def watched(sequences: list[EngineSequence]) -> None:
            seen.extend(sequence.traceparent for sequence in sequences)
            submit(sequences)

        worker.runner.submit = watched  # type: ignore[method-assign]
        for more in (dict[str, Any](traceparent=trace), dict[str, Any]()):
            _, sink = bench.submit(**more)
            await sink.outcome
        assert seen == [trace, ""]

    with caplog.at_level("DEBUG", "p2pdyn.net.worker"):
        run(scenario)
    assert [record.getMessage() for record in caplog.records if "trace" in record.getMessage()] == [
        f"request 1, attempt 0: trace {trace}"
    ]


def test_the_model_card_is_fetched_from_a_worker_and_cached(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a")
        bench.refresh()
        card = await bench.dispatcher.card("m")
        assert card.digest == worker.digest
        assert await bench.dispatcher.card("m") is card
        with pytest.raises(Rejected) as unknown:
            await bench.dispatcher.card("other")
        assert unknown.value.failure.status == 404

    run(scenario)


def test_requests_need_a_known_model_a_worker_and_a_valid_pin(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        with pytest.raises(Rejected) as unknown:
            bench.submit()
        assert unknown.value.failure.status == 404
        worker = await bench.worker("a")
        bench.refresh()
        with pytest.raises(Rejected) as pinned:
            bench.submit(pin="nobody")
        assert pinned.value.failure.status == 503
        _, sink = bench.submit(pin=worker.node)
        assert (await sink.outcome).workers == (worker.node,)
        bench.dispatcher.refresh([])
        with pytest.raises(Rejected) as gone:
            bench.submit()
        assert gone.value.failure.code == "no_ready_worker"
        assert gone.value.failure.retry_after

    run(scenario)


def test_a_prompt_past_the_context_is_the_clients_fault(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.worker("a", "--speedup", "0", "--context", "32")
        bench.refresh()
        _, sink = bench.submit()
        outcome = await sink.outcome
        assert outcome.failure is not None
        assert outcome.failure.status == 400

    run(scenario)


def test_what_the_engine_itself_refuses_is_the_clients_fault_and_tried_nowhere_else(run: Run) -> None:
    """As vLLM's validation does; `sim` refuses nothing."""

    async def scenario(bench: Bench) -> None:
        for worker in (await bench.worker("a"), await bench.worker("b")):
            assert isinstance(worker.runner, InProcessRunner)
            engine = worker.runner.engine
            assert isinstance(engine, SimEngine)

            def refuse(sequence: EngineSequence, now: float, engine: SimEngine = engine) -> None:
                engine._instant.append(Output(sequence.key, (), "invalid", detail="no such grammar"))

            engine.submit = refuse  # type: ignore[method-assign]
        bench.refresh()
        _, sink = bench.submit()
        outcome = await sink.outcome
        assert outcome.failure is not None
        assert (outcome.failure.status, outcome.failure.message) == (400, "no such grammar")
        assert len(sink.routed) == 1
        assert [worker.service.open for worker in bench.workers] == [0, 0]

    run(scenario)


def test_an_orphaned_request_is_cancelled(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        worker = await bench.worker("a", "--itl-ms", "50")
        bench.refresh()
        _, sink = bench.submit(max_tokens=10_000)
        await until(lambda: sink.tokens, "the first token")
        bench.dispatcher.close()  # a frontend that is killed: its connections close without a Cancel
        await until(lambda: worker.service.open == 0, "no open request", within=5.0)
        await until(lambda: not worker.runner.has_work, "an idle engine")

    run(scenario)
