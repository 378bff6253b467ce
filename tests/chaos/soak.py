"""A cluster under load, a fault every few seconds, and what is left of it afterwards: ``scripts/soak --help``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos import wallclock
from chaos.client import Attempt
from chaos.cluster import FRONTENDS, WORKERS, Cluster, wait_at_rest
from chaos.faults import Injector
from chaos.load import Asked, Load
from chaos.schedule import Fault, schedule
from chaos.verdict import DESCRIPTOR_SLACK, GRACE_S, RSS_LIMIT, Trouble, descriptors_grown, faults_on, lost
from chaos.vitals import Vitals
from netns.lab import missing

CALM_S = 3.0
"""Load without a fault before the first one and after the last one."""
GROWTH_JUDGED_S = 300.0
"""Faults for less than this: growth of memory is reported, and plays no part in ``ok``."""
PROMISES = (
    "wrong",
    "lost",
    "unanswered",
    "not_at_rest_before",
    "not_at_rest_after",
    "ended",
    "findings",
    "descriptors_leaked",
    "memory_leaked",
)
"""What must be empty in the report."""
ANCHORS = (FRONTENDS[0], WORKERS[0])


def soak(
    seconds: float,
    seed: int,
    *,
    users: int = 12,
    apart: bool = False,
    transfer: str = "tcp",
    every: float = 5.0,
    logs: Path | None = None,
) -> dict[str, Any]:
    """Run one and report. ``ok`` says whether all promises were kept. ``logs``: a folder for what the nodes said."""
    with tempfile.TemporaryDirectory(prefix="p2pdyn-soak-") as folder:
        why = wallclock.missing()
        faults = plan(seconds, seed, every)
        clocks = None if why else wallclock.build(Path(folder))
        with Cluster(Path(folder), clocks, apart=apart, transfer=transfer) as cluster, Vitals(cluster) as vitals:
            agreed_first = wait_at_rest(cluster)
            began = vitals.descriptors()
            injector = Injector(cluster)
            with Load(cluster.client.space, cluster.urls, users, seed) as load:
                time.sleep(CALM_S)
                carry_out(injector, faults)
                healed = max((t.ended for t in injector.troubles), default=time.monotonic())
                time.sleep(CALM_S)
            left = wait_at_rest(cluster, healed)
            report = judge(load.asked, injector.troubles, cluster)
            ended = [peer.name for peer in cluster.peers.values() if peer.node.process.poll() is not None]
            at_rest = {} if ended else {name: [began[name], now] for name, now in vitals.descriptors().items()}
            agreed_s = round(time.monotonic() - healed, 1)
            if logs is not None:
                keep_logs(cluster, logs)
                vitals.keep(logs / "vitals.csv")
        grown = vitals.growth()
    report |= {
        "seed": seed,
        "seconds": seconds,
        "apart": apart,
        "faults": dict(Counter(fault.kind for fault in faults)),
        "not_at_rest_before": agreed_first,
        "not_at_rest_after": left,
        "at_rest_after_s": agreed_s,
        "ended": ended,
        "descriptors_at_rest": at_rest,
        "descriptors_leaked": [name for name, counts in at_rest.items() if descriptors_grown(*counts)],
        "findings": injector.findings,
        "growth": {name: one._asdict() for name, one in grown.items()},
        "memory_leaked": [name for name, one in grown.items() if one.too_much],
    }
    broken = [what for what in PROMISES if report[what]]
    if seconds < GROWTH_JUDGED_S:
        broken = [what for what in broken if what != "memory_leaked"]
    return {"ok": not broken and report["asked"] > 0, "broken": broken, **report}


def summary(report: dict[str, Any]) -> str:
    """One line: whether all promises were kept, and what each process has grown by."""
    growth = [
        f"{name} {one['rss_mb_a_minute']:+.2f} MB {one['descriptors_a_minute']:+.1f} fds"
        for name, one in report["growth"].items()
    ]
    at_rest = [f"{name} {was} -> {now}" for name, (was, now) in report["descriptors_at_rest"].items()]
    judged = f"limit {RSS_LIMIT:+} MB" if report["seconds"] >= GROWTH_JUDGED_S else "too short to judge"
    verdict = "ok" if report["ok"] else f"not ok ({', '.join(report['broken']) or 'nothing was asked'})"
    return (
        f"{verdict}; growth a minute ({judged}): {', '.join(growth) or 'unknown'}; "
        f"descriptors at rest (limit {DESCRIPTOR_SLACK:+}): {', '.join(at_rest) or 'unknown'}"
    )


def keep_logs(cluster: Cluster, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for node in cluster.lab.nodes:
        (folder / f"{node.host.name}-{node.process.pid}.log").write_text(node.stderr + "\n")


def plan(seconds: float, seed: int, every: float = 5.0) -> list[Fault]:
    without = ("clock",) if wallclock.missing() else ()
    return schedule(seed, seconds, frontends=FRONTENDS, workers=WORKERS, anchors=ANCHORS, without=without, every=every)


def carry_out(injector: Injector, faults: list[Fault]) -> None:
    """Each at its time, in a thread of its own; returns when all have healed."""
    began, threads = time.monotonic(), []
    failures: list[BaseException] = []

    def run(fault: Fault) -> None:
        try:
            injector.run(fault)
        except BaseException as error:
            failures.append(error)

    try:
        for fault in faults:
            time.sleep(max(0.0, began + fault.at - time.monotonic()))
            if failures:
                break
            threads.append(threading.Thread(target=run, args=(fault,), name=str(fault)))
            threads[-1].start()
    finally:
        if failures or sys.exc_info()[0] is not None:
            injector.hurry.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def judge(asked: list[Asked], troubles: list[Trouble], cluster: Cluster) -> dict[str, Any]:
    """Counts of requests and attempts, each failed attempt with the faults that were on, and the silences."""
    attempts = [made for one in asked for made in one.attempts]
    failed = [made for made in attempts if not made.right]
    right = [made for made in attempts if made.right]
    streams = sorted(
        (made for one in asked if one.question.stream for made in one.attempts if made.right),
        key=lambda made: made.silence,
    )
    healthy = [made for made in streams if not _disturbed(made, troubles)]
    return {
        "asked": len(asked),
        "answered": sum(one.answered for one in asked),
        "unanswered": [str(one.attempts[-1].why) for one in asked if not one.answered],
        "attempts": len(attempts),
        "failed": [_failure(made, troubles) for made in failed],
        "wrong": [made.why for made in failed if made.wrong],
        "lost": [_failure(made, troubles) for made in failed if lost(made, troubles, cluster.generating)],
        "migrations": sum(made.migrations for made in right),
        "silence_s": _silences(streams, troubles),
        "silence_at_healthy_frontends_s": _silences(healthy, troubles),
    }


def _failure(made: Attempt, troubles: list[Trouble]) -> dict[str, Any]:
    return {
        "frontend": made.frontend,
        "after_s": round(made.ended - made.began, 2),
        "why": made.why[:300],
        "faults": faults_on(made, troubles),
    }


def _disturbed(made: Attempt, troubles: list[Trouble]) -> bool:
    """The frontend itself was hit."""
    return any(made.frontend in t.peers and t.on(made.began, made.ended, GRACE_S) for t in troubles)


def _silences(right: Sequence[Attempt], troubles: list[Trouble]) -> dict[str, Any]:
    """Of streams with the right answer, in order of silence."""
    if not right:
        return {}
    p50, p99 = (round(right[int(share * len(right))].silence, 3) for share in (0.5, 0.99))
    worst = [{"s": round(made.silence, 2), "faults": faults_on(made, troubles)} for made in reversed(right[-5:])]
    return {"p50": p50, "p99": p99, "max": round(right[-1].silence, 3), "worst": worst}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long faults go on (default 10)")
    parser.add_argument("--seed", type=int, default=1, help="same seed, same faults (default 1)")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults (default 5)")
    parser.add_argument("--users", type=int, default=12, help="requests at a time (default 12)")
    parser.add_argument("--apart", action="store_true", help="two workers prefill, two decode")
    parser.add_argument("--kv-transfer", default="tcp", choices=("tcp", "nixl", "auto", "off"))
    parser.add_argument("--schedule", action="store_true", help="print the faults and end")
    parser.add_argument("--logs", type=Path, help="a folder to leave the nodes' stderr in, and vitals.csv")
    parser.add_argument("--json", action="store_true", help="the report as one JSON line")
    parser.add_argument("--or-skip", action="store_true", help="succeed where hosts cannot be made, and say why")
    args = parser.parse_args()
    for fault in plan(args.minutes * 60, args.seed, args.every):
        print(fault, file=sys.stdout if args.schedule else sys.stderr)
    if args.schedule:
        return 0
    if why := missing():
        print(f"skipped: {why}" if args.or_skip else f"cannot run: {why}", file=sys.stderr)
        return 0 if args.or_skip else 1
    report = soak(
        args.minutes * 60,
        args.seed,
        users=args.users,
        apart=args.apart,
        transfer=args.kv_transfer,
        every=args.every,
        logs=args.logs,
    )
    print(json.dumps(report) if args.json else json.dumps(report, indent=2), flush=True)
    print(summary(report), file=sys.stderr)
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
