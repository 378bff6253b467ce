"""Pure state machines: no sockets, no clock, no asyncio, no threads.

The contract of every machine here (after foca, dask's worker state machine, swift-cluster-membership and h11):

* ``handle(event, now) -> list[Action]``: feed one input, get the effects that a shell must carry out, in order.
* ``next_deadline() -> float | None``: when to call ``handle(Tick(), now)`` next if nothing else happens first.
* ``now`` is seconds on a monotonic clock and is passed in; randomness is a ``random.Random`` given to the constructor.
* Events and actions are frozen dataclasses; tests compare whole action lists.

So a thousand nodes run in one process on a heap of deadlines, and a failure replays from its event log.
``tests/core/test_purity.py`` checks what importing this package loads.
"""
