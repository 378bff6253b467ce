"""Hostile inputs against a running cluster, one after the other, and what each got: a table.

    scripts/hostile [--quick] [--group NAME]... [--markdown]

Exit code 1 where an answer is not the documented one, or where anybody else noticed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import hostile_http, hostile_wire
from support.hostile import AGAIN_MB, Case, Outcome, attacked

QUICK = 0.1
"""Size of floods in the quick form."""


def every_case() -> list[Case]:
    return [*hostile_http.cases(), *hostile_wire.cases()]


def row(outcome: Outcome) -> tuple[str, str, str, str]:
    case = outcome.case
    answer = outcome.answer if outcome.good or outcome.undisturbed else f"{outcome.answer}, NOT {case.wanted}"
    return case.group, case.name, answer, outcome.undisturbed or "yes"


def show(rows: Sequence[tuple[str, str, str, str]], markdown: bool) -> str:
    titles = ("group", "input", "answer", "cluster undisturbed")
    if markdown:
        rows = [tuple(cell.replace("|", "\\|") for cell in one) for one in rows]  # type: ignore[misc]
        return "\n".join(["| " + " | ".join(one) + " |" for one in (titles, ("---",) * len(titles), *rows)])
    widths = [max(len(one[column]) for one in [titles, *rows]) for column in range(len(titles))]
    padded = [[cell.ljust(width) for cell, width in zip(one, widths, strict=True)] for one in [titles, *rows]]
    return "\n".join(["  ".join(cells).rstrip() for cells in padded])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="smaller floods")
    parser.add_argument("--group", action="append", help="only these groups")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    cases = [case for case in every_case() if not options.group or case.group in options.group]
    with tempfile.TemporaryDirectory() as folder, attacked(Path(folder), QUICK if options.quick else 1.0) as field:
        before = field.held()
        outcomes = []
        for outcome in field.run(cases):
            outcomes.append(outcome)
            print(f"{'ok ' if outcome.good else 'BAD'} {' | '.join(row(outcome))}", file=sys.stderr)
        left = field.left_behind(before)
        after = field.held()
        for _ in field.run([case for case in cases if case.heavy]):
            pass
        left = left or field.left_behind(after, AGAIN_MB)
    print(show([row(outcome) for outcome in outcomes], options.markdown))
    good = sum(outcome.good for outcome in outcomes)
    print(f"\n{good} of {len(outcomes)} inputs got the documented answer with nobody disturbed; "
          f"left behind: {left or 'nothing'} (MB and descriptors of each process before "
          f"{[(round(mb), fds) for mb, fds in before]}, after {[(round(mb), fds) for mb, fds in after]})")  # fmt: skip
    return 0 if good == len(outcomes) and not left else 1


if __name__ == "__main__":
    sys.exit(main())
