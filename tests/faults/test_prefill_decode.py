"""Prefill and decode on different peers: real processes, real blocks over NIXL and over tcp, and what can go wrong."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.nodes import Cluster, NodeProcess, make_key, wait_for
from support.pd import MODELS, Asked, PdCluster, prompt, reference

from p2pdyn.core.lease import LEASE_S
from p2pdyn.core.pull import REPLY_S

TOKENS = 24
LENGTH = {"sim": 800, "builtin": 400}
"""Tokens of a prompt."""

MOVERS = ("nixl", "tcp")
ALL = [(engine, mover) for engine in ("sim", "builtin") for mover in MOVERS]
BOTH = [("sim", "nixl"), ("builtin", "tcp")]
NAMES = ["-".join(pair) for pair in BOTH]


@pytest.fixture(autouse=True)
def movers(request: pytest.FixtureRequest) -> None:
    if "nixl" in request.node.name:
        pytest.importorskip("nixl", reason="nixl is not installed")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path, make_key(tmp_path)) as nodes:
        yield nodes


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The answers of one aggregated worker to :func:`prompts`."""
    known: dict[str, list[str]] = {}

    def ask(engine: str) -> list[str]:
        if engine not in known:
            known[engine] = reference(tmp_path_factory.mktemp("reference") / engine, engine, prompts(engine), TOKENS)
        return known[engine]

    return ask


def prompts(engine: str) -> list[str]:
    """Eight of them; the second half goes on from the first."""
    size = LENGTH[engine]
    own = [prompt(size + 7 * seed, seed) for seed in range(4)]
    return own + [text + prompt(size // 2, 100 + seed) for seed, text in enumerate(own)]


@pytest.mark.parametrize(("engine", "mover"), ALL, ids=["-".join(pair) for pair in ALL])
def test_the_answers_are_those_of_one_worker(
    cluster: Cluster, expected: Callable[[str], list[str]], engine: str, mover: str
) -> None:
    pd = PdCluster(cluster, engine, mover)
    first, second = pd.start("p", "prefill"), pd.start("d", "decode")
    pd.ready()
    texts, wanted = prompts(engine), expected(engine)
    assert [pd.complete(text, TOKENS)[0] for text in texts[:4]] == wanted[:4]
    assert pd.transfers(second)["outcomes"]["filled"] == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: pd.complete(text, TOKENS)[0], texts[4:])) == wanted[4:]
    report = pd.transfers(second)
    assert report["mover"] == mover
    assert report["outcomes"]["filled"] == len(texts), report
    assert report["outcomes"]["failed"] == 0, report
    pd.all_given_back(first, second)


@pytest.mark.parametrize("moment", ["computing", "before", "after"])
@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_a_prefill_worker_is_killed(
    cluster: Cluster, expected: Callable[[str], list[str]], tmp_path: Path, engine: str, mover: str, moment: str
) -> None:
    """While it computes; with the read not begun; with the read over and not yet proven."""
    slow = {"sim": ("--", "--prefill-tps", "1000"), "builtin": ("--model", "tiny", "--", "--max-batch-tokens", "8")}
    pd = PdCluster(cluster, engine, mover)
    hold = tmp_path / "hold"
    victim = pd.start("p", "prefill", args=slow[engine] if moment == "computing" else ())
    decode = pd.start("d", "decode", hold=hold)
    pd.ready()
    if moment != "computing":
        (hold / moment).touch()
    asked = Asked(pd, prompts(engine)[0])
    if moment == "computing":
        wait_for(lambda: pd.transfers(victim)["active_requests"], 10, "the prompt is being computed")
    else:
        pd.stage(decode, "reading")
    victim.kill()
    (hold / moment).unlink(missing_ok=True)
    assert asked.answer() == expected(engine)[0]
    pd.all_given_back(decode)


@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_a_prefill_worker_is_killed_after_the_transfer(
    cluster: Cluster, expected: Callable[[str], list[str]], engine: str, mover: str
) -> None:
    pd = PdCluster(cluster, engine, mover)
    victim, decode = pd.start("p", "prefill"), pd.start("d", "decode")
    pd.ready()
    asked = Asked(pd, prompts(engine)[0])
    wait_for(lambda: pd.transfers(decode)["outcomes"]["filled"], 15, "the transfer is over")
    victim.kill()
    assert asked.answer() == expected(engine)[0]
    assert pd.complete(prompts(engine)[1], TOKENS)[0] == expected(engine)[1]
    pd.all_given_back(decode)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_a_decode_worker_is_killed_amid_the_transfer(
    cluster: Cluster, expected: Callable[[str], list[str]], tmp_path: Path, engine: str, mover: str, moment: str
) -> None:
    pd = PdCluster(cluster, engine, mover)
    hold = tmp_path / "hold"
    prefill, victim = pd.start("p", "prefill"), pd.start("d", "decode", hold=hold)
    pd.ready()
    (hold / moment).touch()
    asked = Asked(pd, prompts(engine)[0])
    pd.stage(victim, "reading")
    other = pd.start("other", "decode").wait_ready(60)
    victim.kill()
    assert asked.answer() == expected(engine)[0]
    pd.all_given_back(prefill, other)


@pytest.mark.parametrize("who", ["prefill", "decode"])
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_a_worker_stands_still_for_longer_than_the_lease(
    cluster: Cluster,
    expected: Callable[[str], list[str]],
    tmp_path: Path,
    engine: str,
    mover: str,
    moment: str,
    who: str,
) -> None:
    """The other goes on without it; when it is back it neither uses nor gives what has been given back."""
    pd = PdCluster(cluster, engine, mover)
    hold = tmp_path / "hold"
    prefill, decode = pd.start("p", "prefill"), pd.start("d", "decode", hold=hold)
    pd.ready()
    texts, wanted = prompts(engine), expected(engine)
    (hold / moment).touch()
    asked = [Asked(pd, texts[0]), Asked(pd, texts[1])]
    pd.stage(decode, "reading")
    frozen = prefill
    if who == "decode":  # somebody has to go on
        frozen = decode
        pd.start("other", "decode").wait_ready(60)
    frozen.signal(signal.SIGSTOP)
    still = threading.Event()
    still.wait(LEASE_S + REPLY_S)
    (hold / moment).unlink()
    frozen.signal(signal.SIGCONT)
    assert [one.answer() for one in asked] == wanted[:2]
    assert [pd.complete(text, TOKENS)[0] for text in texts[2:5]] == wanted[2:5]
    pd.all_given_back(*pd.workers)


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_a_prefill_worker_is_restarted_under_its_id(
    cluster: Cluster, expected: Callable[[str], list[str]], tmp_path: Path, engine: str, mover: str, moment: str
) -> None:
    """What was said of its former life's blocks means nothing in the new one."""
    pd = PdCluster(cluster, engine, mover)
    hold = tmp_path / "hold"
    former, decode = pd.start("p", "prefill"), pd.start("d", "decode", hold=hold)
    pd.ready()
    (hold / moment).touch()
    asked = Asked(pd, prompts(engine)[0])
    pd.stage(decode, "reading")
    former.kill()
    pd.workers.remove(former)
    again = pd.start("p", "prefill").wait_ready(60)
    assert again.id == former.id
    (hold / moment).unlink()
    assert asked.answer() == expected(engine)[0]
    pd.ready()
    assert pd.complete(prompts(engine)[1], TOKENS)[0] == expected(engine)[1]
    assert pd.transfers(decode)["outcomes"]["filled"] >= 1
    pd.all_given_back(again, decode)


@pytest.mark.parametrize("moment", ["computing", "before", "after", "decoding"])
@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_the_client_leaves(cluster: Cluster, tmp_path: Path, engine: str, mover: str, moment: str) -> None:
    slow = {"sim": ("--", "--prefill-tps", "1000"), "builtin": ("--model", "tiny", "--", "--max-batch-tokens", "8")}
    pd = PdCluster(cluster, engine, mover)
    hold = tmp_path / "hold"
    prefill = pd.start("p", "prefill", args=slow[engine] if moment == "computing" else ())
    decode = pd.start("d", "decode", hold=hold)
    pd.ready()
    if moment in ("before", "after"):
        (hold / moment).touch()
    url = urlsplit(pd.frontend.url)
    client = http.client.HTTPConnection(url.hostname or "", url.port, timeout=20)
    body = {"model": MODELS[engine], "prompt": prompts(engine)[0], "max_tokens": 400, "stream": True}
    client.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    if moment == "computing":
        wait_for(lambda: pd.transfers(prefill)["active_requests"], 10, "the prompt is being computed")
    elif moment == "decoding":
        assert client.getresponse().readline()
    else:
        pd.stage(decode, "reading")
    client.close()
    if moment in ("before", "after"):
        wait_for(lambda: not pd.transfers(decode)["pulls"]["reading"], 5, "the pull is given up")
        (hold / moment).unlink()
    pd.all_given_back(prefill, decode)


@pytest.mark.parametrize(("engine", "mover"), BOTH, ids=NAMES)
def test_a_transfer_does_not_end(
    cluster: Cluster, expected: Callable[[str], list[str]], tmp_path: Path, engine: str, mover: str
) -> None:
    """The answer comes without it; the blocks that it may still write stay out of use until it is over."""
    pd = PdCluster(cluster, engine, mover)
    hold = tmp_path / "hold"
    prefill, decode = pd.start("p", "prefill"), pd.start("d", "decode", hold=hold)
    pd.ready()
    (hold / "after").touch()
    assert pd.complete(prompts(engine)[0], TOKENS)[0] == expected(engine)[0]
    assert pd.transfers(decode)["pulls"]["draining"] == 1
    (hold / "after").unlink()
    pd.all_given_back(prefill, decode)
    assert pd.complete(prompts(engine)[1], TOKENS)[0] == expected(engine)[1]
    assert pd.transfers(decode)["outcomes"]["filled"] == 1


def test_without_prefill_workers_decode_workers_compute(cluster: Cluster, expected: Callable[[str], list[str]]) -> None:
    pd = PdCluster(cluster, "sim", "tcp")
    decode = pd.start("d", "decode")
    pd.ready()
    assert pd.complete(prompts("sim")[0], TOKENS)[0] == expected("sim")[0]
    assert "prefill" in _ready(pd.frontend)[1]
    pd.all_given_back(decode)


def test_prefill_workers_alone_are_not_ready_and_say_so(cluster: Cluster) -> None:
    pd = PdCluster(cluster, "sim", "tcp")
    pd.start("p", "prefill")
    pd.ready()
    status, text = _ready(pd.frontend)
    assert status == 503
    assert "decode" in text


def _ready(node: NodeProcess) -> tuple[int, str]:
    url = urlsplit(node.url)
    client = http.client.HTTPConnection(url.hostname or "", url.port, timeout=5)
    try:
        client.request("GET", "/ready")
        answer = client.getresponse()
        return answer.status, answer.read().decode()
    finally:
        client.close()
