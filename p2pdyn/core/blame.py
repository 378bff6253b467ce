"""Which request kills its workers, and which merely were there.

A worker's death is put down to every request that was open on it.  One that has been there at :data:`SUSPECT_DEATHS`
deaths is a suspect: from then on it is run apart from other suspects, one on a worker at a time (a trial).  A trial
ends well once tokens have come for some time; a suspect whose worker dies during its trial has done it.  Then that
death, and the earlier ones that it was there for, are explained and nobody else answers for them.  It is ended when
:data:`PROOF_S` have passed and the worker has not shown that it lives.

So a request that kills every worker it comes to ends after :data:`DEATH_LIMIT` of them, and those beside it go on,
however many of its victims they shared.  Each trial of a request is longer than the one before, so that one that kills
later than at its next token is found too.

A worker that was only cut off and comes back with the same epoch has not died: :meth:`Blame.lives` takes it back.
"""

from __future__ import annotations

from collections.abc import Collection

from p2pdyn.core.types import NodeId

SUSPECT_DEATHS = 2
DEATH_LIMIT = SUSPECT_DEATHS + 1
"""Workers that a request may have killed when it is ended."""

TRIAL_S = 0.5
"""Tokens must come for this long in a first trial: a request that killed its worker kills the next one within a token
or two, and tokens that nobody streams are told each 0.25 s."""

PROOF_S = 1.0
"""A worker whose connection broke and that lives is back on a new one within two round trips and 0.1 s."""

TRIAL_GROWTH = 4
"""Each further trial of the same request is that much longer."""


class Blame:
    """Pure; requests are known by number."""

    def __init__(self) -> None:
        self.convicted = 0
        self._number = 0
        self._deaths: dict[int, set[int]] = {}
        """Of each request that was there at one: those that nobody else is known to have done."""
        self._last: dict[NodeId, int] = {}
        """The last death of each worker that somebody was there for."""
        self._trials: dict[NodeId, int] = {}
        self._passed: dict[int, int] = {}

    @property
    def trials(self) -> Collection[NodeId]:
        """Workers that a suspect runs on."""
        return self._trials.keys()

    def suspect(self, rid: int) -> bool:
        """Whether it must run apart from other suspects."""
        return len(self._deaths.get(rid, ())) >= SUSPECT_DEATHS

    def died(self, worker: NodeId, rids: Collection[int]) -> int | None:
        """A worker has died, or its engine, with these open on it: the one that did it, if one was on trial."""
        on_trial = self._trials.pop(worker, None)
        if on_trial not in rids:
            on_trial = None
        self._number += 1
        self._last[worker] = self._number
        for rid in rids if on_trial is None else (on_trial,):
            self._deaths.setdefault(rid, set()).add(self._number)
        return on_trial

    def convict(self, rid: int) -> None:
        """It has killed the workers that it was there for."""
        self.convicted += 1
        self._explain(set(self._deaths.get(rid, ())))

    def lives(self, worker: NodeId) -> None:
        """What was taken for its last death was none."""
        number = self._last.pop(worker, None)
        if number is not None:
            self._explain({number})

    def begin(self, rid: int, worker: NodeId) -> float:
        """A suspect is sent to ``worker``: seconds for which its tokens must come."""
        self._trials[worker] = rid
        return TRIAL_S * float(TRIAL_GROWTH ** self._passed.get(rid, 0))

    def passed(self, rid: int) -> None:
        """The trial went well: only another death makes it a suspect again."""
        self._passed[rid] = self._passed.get(rid, 0) + 1
        deaths = self._deaths.get(rid, set())
        while len(deaths) >= SUSPECT_DEATHS:
            deaths.discard(min(deaths))
        self.left(rid)

    def left(self, rid: int) -> None:
        """It is on its worker no more, or on trial no more: the worker is free for another suspect."""
        for worker in [worker for worker, one in self._trials.items() if one == rid]:
            del self._trials[worker]

    def forget(self, rid: int) -> None:
        """The request has ended."""
        self._deaths.pop(rid, None)
        self._passed.pop(rid, None)
        self.left(rid)

    def _explain(self, deaths: set[int]) -> None:
        for rid, known in list(self._deaths.items()):
            known -= deaths
            if not known:
                del self._deaths[rid]
