"""Drives the membership core over the control link: one ROUTER, pooled DEALERs, one timer.

Decides nothing about members: what comes in becomes an event, what the core answers is carried out in order.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from p2pdyn.constants import CONTROL_MAX, CONTROL_PING_S
from p2pdyn.core.actions import Action, Alarm, Fatal, MemberChanged, Reply, Send
from p2pdyn.core.events import Announce, Event, Introduced, Leave, LinkDown, ProbeNow, Received, Tick
from p2pdyn.core.membership import Member, Membership, MembershipConfig
from p2pdyn.core.membership_roster import ALIVE
from p2pdyn.core.types import INCOMPATIBLE, Address, NodeId, PeerInfo, Version
from p2pdyn.net.admin import AdminDesk, Handler
from p2pdyn.net.clocks import LoopLag, WallClocks
from p2pdyn.net.complaints import Complaints
from p2pdyn.net.pool import Pool
from p2pdyn.net.sockets import Sockets
from p2pdyn.wire.codec import FutureVersion, WireError, decode, decode_info, encode, encode_info
from p2pdyn.wire.header import AdminCall, AdminPage, Foreign, Header
from p2pdyn.wire.schema import CONTROL

log = logging.getLogger(__name__)

GOODBYE_S = 0.8
"""How long a leaving peer stays to say so: four gossip rounds."""
FUTURE_ALARM_S = 600.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A member as this peer sees it now. ``state`` is alive, suspect, dead or left; ``info`` is what it says of itself.

    ``last_seen_s`` is how many seconds ago it was heard itself; ``clock_s`` how many its wall clock is ahead of ours,
    None if not known.
    """

    id: NodeId
    info: PeerInfo
    version: Version
    address: Address
    state: str
    last_seen_s: float
    clock_s: float | None


class Mesh:
    """One peer's membership. Made, used and closed inside the running loop.

    ``listen`` are the control addresses to bind (port 0: one free port for all); ``advertise_host`` is the one of them
    that others connect to.  ``on_change(peer, was)`` reports each change of a member, ``was`` being its state before,
    None for a new one; ``on_fatal(sentence)`` that this node must stop.
    """

    def __init__(
        self,
        sockets: Sockets,
        *,
        node: NodeId,
        epoch: int,
        cluster: str,
        info: PeerInfo,
        listen: Sequence[Address],
        advertise_host: str,
        on_change: Callable[[Peer, str | None], None],
        on_fatal: Callable[[str], None],
        rng: random.Random,
        config: MembershipConfig | None = None,
    ) -> None:
        self.node = node
        self.cluster = cluster
        self.complaints = Complaints()
        self._sockets = sockets
        self._on_change = on_change
        self._on_fatal = on_fatal
        self._loop = asyncio.get_running_loop()
        self._router = sockets.router(listen, self._on_question, max_size=CONTROL_MAX, ping_s=CONTROL_PING_S)
        self.address = Address(advertise_host, self._router.addresses[0].port)
        """Of the control link, as other peers know it."""
        self._pool = Pool(sockets, self._on_answer, self._on_link_down)
        local = Member(node, Version(epoch, 0), self.address, ALIVE, encode_info(info))
        self._core = Membership(local, config or MembershipConfig(), rng)
        self._admin = AdminDesk()
        self._clocks = WallClocks()
        self._lag = LoopLag(self._loop)
        self._alarms: dict[str, tuple[float, str]] = {}
        self._traffic: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._running = False

    # What the node does with it.

    def start(self) -> None:
        """Take part. Before this, nothing is sent or answered."""
        self._running = True
        self._handle(Tick())

    def introduce(self, address: Address, source: str) -> None:
        """A peer may be at ``address``, an IP address, says ``source`` (seed, mdns)."""
        log.debug("%s introduced %s", source, address)
        self._handle(Introduced(address))

    def update(self, info: PeerInfo) -> None:
        """Change what this peer says of itself, and tell everybody at once."""
        self._handle(Announce(encode_info(info)))

    def probe(self, node: NodeId) -> None:
        """Somebody saw this peer fail: probe it before the others."""
        self._handle(ProbeNow(node))

    @property
    def peers(self) -> Mapping[NodeId, Peer]:
        """All known members now, this one included."""
        now = time.monotonic()
        return {member.id: self._peer(member, now) for member in self._core.members.values()}

    def on_admin(self, op: str, handler: Handler) -> None:
        """Answer admin operation ``op`` with what ``handler`` returns, a JSON object; ValueError, LookupError and
        AdminError become the caller's error."""
        self._admin.on(op, handler)

    def alarms(self) -> list[str]:
        """What people should look at now."""
        now = time.monotonic()
        return [text for until, text in self._alarms.values() if until > now]

    def refused(self) -> dict[str, int]:
        """How often each address was turned away: another or no cluster key, no peer at all, or another cluster."""
        refused: Counter[str] = Counter(self.complaints.by_source("foreign-cluster"))
        for kind in ("refused-key", "bad-handshake"):
            refused.update(self._sockets.complaints.by_source(kind))
        return dict(refused)

    @property
    def counters(self) -> dict[str, int]:
        """Counted since the start, for metrics: traffic in messages and bytes, and what was dropped, by reason."""
        totals = self._traffic + self.complaints.counts + self._sockets.complaints.counts
        totals["unsent"] = self._pool.unsent + self._router.unsent
        return dict(totals)

    @property
    def loop_lag_s(self) -> float:
        """The worst delay of this process's loop in the last minute."""
        return self._lag.seconds

    async def leave(self, timeout_s: float) -> None:
        """Tell the others that this peer goes, and stay while the news spreads."""
        if self._running:
            self._handle(Leave())
            if any(member.live for member in self._core.members.values() if member.id != self.node):
                await asyncio.sleep(min(timeout_s, GOODBYE_S))

    def close(self) -> None:
        """Stop at once. Idempotent."""
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._lag.close()
        self._admin.close()
        self._pool.close()
        self._router.close()

    # Events in, actions out.

    def _handle(self, event: Event) -> None:
        if not self._running:
            return
        try:
            for action in self._core.handle(event, time.monotonic()):
                self._carry_out(action)
        finally:
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._core.next_deadline()
        if deadline is not None and self._running:
            self._timer = self._loop.call_later(max(0.001, deadline - time.monotonic()), self._handle, Tick())

    def _carry_out(self, action: Action) -> None:
        if isinstance(action, Send):
            self._send(action.to, action.message)
        elif isinstance(action, Reply):
            assert isinstance(action.to, bytes)
            self._router.send((action.to, *self._count("sent", self._frames(action.message))))
        elif isinstance(action, MemberChanged):
            self._changed(action.member, action.was)
        elif isinstance(action, Alarm):
            self._alarm(action.kind, action.text, action.for_s)
        elif isinstance(action, Fatal):
            self._on_fatal(action.text)

    def _send(self, to: Address, message: object) -> None:
        frames = self._count("sent", self._frames(message))
        try:
            self._pool.send(to, frames)
        except ValueError as error:
            self.complaints.add("bad-address", str(to), f"cannot reach a peer: {error}")

    def _changed(self, member: Member, was: str | None) -> None:
        if member.state != ALIVE:
            self._pool.drop(member.address)
            if not member.live:
                self._clocks.forget(member.id)
        self._on_change(self._peer(member, time.monotonic()), was)

    def _alarm(self, kind: str, text: str, for_s: float) -> None:
        if for_s <= 0:
            self._alarms.pop(kind, None)
            return
        if self._alarms.get(kind, (0.0, ""))[1] != text:
            log.warning("%s", text)
        self._alarms[kind] = (time.monotonic() + for_s, text)

    def _peer(self, member: Member, now: float) -> Peer:
        own = member.id == self.node
        return Peer(
            member.id,
            _info(member.info, member.id),
            member.version,
            member.address,
            member.state,
            0.0 if own else max(0.0, now - member.last_seen),
            0.0 if own else self._clocks.ahead(member.id),
        )

    # The wire.

    def _frames(self, message: object) -> tuple[bytes, bytes]:
        header = Header(self.cluster, self.node, self._core.local.version.epoch, time.time_ns() // 1_000_000)
        return encode(header), encode(message)

    def _count(self, way: str, frames: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
        self._traffic[f"{way}-messages"] += 1
        self._traffic[f"{way}-bytes"] += len(frames[0]) + len(frames[1])
        return frames

    def _on_question(self, frames: list[bytes]) -> None:
        """A message on our ROUTER."""
        source = self._router.sender()
        opened = self._open(frames[1:], source)
        if opened is None or not self._running:
            return
        header, message = opened
        connection = frames[0]
        if isinstance(message, AdminCall) and header.cluster in ("", self.cluster):
            self._admin.answer(message, lambda page: self._answer_admin(connection, page))
        elif header.cluster != self.cluster:
            self._turn_away(header, source)
            if not isinstance(message, Foreign):
                self._router.send((connection, *self._frames(Foreign())))
        elif (header.node, header.epoch) != (self.node, self._core.local.version.epoch):  # our own other address
            self._received(header, message, connection)

    def _on_answer(self, address: Address, frames: list[bytes]) -> None:
        """A message that came back on one of our DEALERs."""
        opened = self._open(frames, str(address))
        if opened is None:
            return
        header, message = opened
        if header.cluster != self.cluster:
            self._turn_away(header, str(address))
        else:
            self._received(header, message, None)

    def _received(self, header: Header, message: object, reply: bytes | None) -> None:
        if header.node in self._core.members:
            self._clocks.seen(NodeId(header.node), header.wall_ms, time.time(), time.monotonic())
        self._handle(Received(message, reply, header.node))

    def _answer_admin(self, connection: bytes, page: AdminPage) -> bool:
        return self._router.send((connection, *self._frames(page)))

    def _turn_away(self, header: Header, source: str) -> None:
        self.complaints.add(
            "foreign-cluster",
            source,
            f"{source} belongs to cluster {header.cluster!r}, this peer to {self.cluster!r}: "
            "give both the same --cluster, or other ports",
        )

    def _open(self, frames: list[bytes], source: str) -> tuple[Header, object] | None:
        """Decode a header and its message; what cannot be decoded is counted and dropped."""
        try:
            if len(frames) != 2:
                raise WireError("not a header and a message")
            self._count("received", (frames[0], frames[1]))
            header, message = decode(CONTROL, frames[0]), decode(CONTROL, frames[1])
            if not isinstance(header, Header) or isinstance(message, Header):
                raise WireError("not a header and a message")
            return header, message
        except FutureVersion as error:
            text = f"{source} sent a message of {error}"
            self.complaints.add("future-version", source, text)
            self._alarms["future-version"] = (time.monotonic() + FUTURE_ALARM_S, text)
        except WireError as error:
            self.complaints.add("bad-message", source, f"dropped a message from {source} that cannot be read: {error}")
        return None

    def _on_link_down(self, address: Address, reason: str) -> None:
        log.debug("%s", reason)
        self._handle(LinkDown(address))


@lru_cache(maxsize=4096)
def _info(data: bytes, node: str) -> PeerInfo:
    try:
        return decode_info(data)
    except WireError as error:
        detail = f"what it says of itself cannot be read ({error}): do all peers run the same version?"
        return PeerInfo(node, "unknown", state=INCOMPATIBLE, detail=detail)
