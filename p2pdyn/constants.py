"""Protocol constants: unit, reason, bound. Membership's own live in :mod:`p2pdyn.core.membership_config`."""

from __future__ import annotations

PROTOCOL_VERSION = 1
"""First byte of every message. A peer drops and counts what carries a higher one."""

DEFAULT_PORT = 7400
"""Control; requests are at +1, events at +2, the tcp KV fallback at +3."""

HASH_SEED = 1337
"""Of the KV block hash (design: Dynamo's seed, so that its events could be consumed)."""

CONTROL_MAX = 64 * 1024
"""Bytes: largest control message. A large prompt must never delay a probe."""

CONTROL_IDLE_S = 15.0
"""A control connection without a message for this long is closed: it bounds descriptors where the peers are many."""

CONTROL_PING_S = 15.0
"""ZMTP heartbeats on control connections. SWIM decides on liveness; each 2 s at 1000 nodes they are 8 kB/s a node."""

REQUEST_MAX = 20 * 2**20
"""Bytes: largest request-link message (a 4 Mi token prompt and its parameters)."""

EVENT_MAX = 4 * 2**20
"""Bytes: largest event message."""

TRANSFER_MAX = 300 * 1024
"""Bytes: largest message, or part of KV blocks, of the tcp mover."""

PEER_INFO_MAX = 1024
"""Bytes: a peer's encoded PeerInfo; it rides in gossip, so it must fit many times into one control message."""

STREAM_HEARTBEAT_S = 0.25
"""A worker's heartbeat to each frontend with open streams; four may be lost before the worker is suspect."""

STREAM_SILENCE_S = 1.0
"""No frame from a worker with open streams for this long: suspect for routing, on that frontend."""

HELLO_S = 1.0
"""A frontend's Hello on each open request link."""

ORPHAN_S = 4.0
"""A worker cancels the requests of a connection without Hello for this long (a frontend that died silently)."""

LOAD_EVENT_S = 0.25
"""Longest time between two load events of one worker."""

LOAD_SETTLE_S = 0.02
"""A worker that turns busy or idle says so this soon. Not at once: under light load that is twice a request."""

LOAD_SOON_S = 0.005
"""A worker that has got a long prompt says so this soon: until then other frontends send theirs to the same one. Not at
once, so that a burst is one event, and longer than a request is on its way."""

WORK_MEMORY_S = 60.0
"""Memory of the prefill that a worker was given: its conversations will come back to it."""

LINK_IDLE_S = 300.0
"""A frontend lets go of a model's request and event links after this long without a request."""

MODEL_KNOWN_S = 600.0
"""A model whose last worker left answers 503 for this long, then 404."""

SLOW_READER_BYTES = 256 * 1024
SLOW_READER_S = 30.0
"""A stream whose client leaves this much, or for this long, unread is cancelled."""
UCX_PORTS = "7410-7499"
"""Where NIXL's UCX listens, unless UCX_TCP_PORT_RANGE says otherwise: a fixed range, so that a firewall can name it."""
