"""SWIM's probes: ask directly, ask again, ask through others, then suspect."""

from __future__ import annotations

from dataclasses import dataclass

from p2pdyn.core.actions import Reply
from p2pdyn.core.isolation import Isolation
from p2pdyn.core.membership_context import Context
from p2pdyn.core.membership_gossip import Spreader
from p2pdyn.core.membership_merge import Merger
from p2pdyn.core.membership_roster import Member, rumour, whole_record
from p2pdyn.core.types import SUSPECT, Address, NodeId
from p2pdyn.wire.control import ALIVE_CODE, Ack, Nack, Ping, PingReq

PROBE = "probe"
RETRY = "probe-retry"
INDIRECT = "probe-indirect"
AGAIN = "probe-again"
FAIL = "probe-fail"
RELAY = "relay"
REPROBE = "reprobe"


@dataclass(slots=True)
class _Probe:
    target: NodeId
    epoch: int
    in_turn: bool
    relays: int = 0
    nacks: int = 0


@dataclass(slots=True)
class _Relay:
    """A probe made for somebody else; ``to`` is where the answer goes."""

    to: object
    seq: int
    target: NodeId
    address: Address
    nacked: bool = False


class Prober:
    def __init__(self, context: Context, spreader: Spreader, merger: Merger, isolation: Isolation) -> None:
        self._context = context
        self._spreader = spreader
        self._merger = merger
        self._isolation = isolation
        self._probes: dict[int, _Probe] = {}
        self._targets: dict[NodeId, int] = {}
        self._relays: dict[int, _Relay] = {}

    def start(self) -> None:
        """Begin at a random phase, so that nodes started together do not probe in step."""
        if not self._context.timers.armed(PROBE):
            self._context.arm(self._context.rng.random() * self._context.config.probe_small_s, PROBE)

    def turn(self, _: object = None) -> None:
        """The next in order, each interval."""
        context = self._context
        roster, few = context.roster, context.roster.nodes <= context.config.small
        member = roster.next_of_all() if few else roster.next_subject()
        if member is not None and member.id not in self._targets:
            self._begin(member, in_turn=True)
        interval = context.config.probe_interval(context.roster.nodes)
        context.arm(context.awareness.scale(interval), PROBE)

    def now(self, node: NodeId) -> None:
        """Out of turn, because there is reason to worry."""
        member = self._context.roster.members.get(node)
        if member is not None and member.live and node not in self._targets and node != self._context.roster.id:
            self._begin(member, in_turn=False)

    def _begin(self, member: Member, in_turn: bool) -> None:
        context = self._context
        seq = context.number()
        self._probes[seq] = _Probe(member.id, member.version.epoch, in_turn)
        self._targets[member.id] = seq
        self._ping(seq, member)
        context.arm(context.awareness.scale(context.config.retry_s), RETRY, seq)

    def _ping(self, seq: int, member: Member) -> None:
        """A suspect is told of it (Lifeguard's buddy system), so that its answer can bring the refutation."""
        first = rumour(member, SUSPECT, self._context.roster.id) if member.state == SUSPECT else None
        self._context.send(member.address, Ping(seq, member.id, self._spreader.piggyback(first)))

    def _open(self, seq: object) -> tuple[_Probe, Member] | None:
        """The probe and its target; one of a life that is over ends here."""
        probe = self._probes.get(seq)  # type: ignore[call-overload]
        if probe is None:
            return None
        member = self._context.roster.members.get(probe.target)
        if member is None or not member.live or member.version.epoch != probe.epoch:
            self._close(seq)
            return None
        return probe, member

    def _close(self, seq: object) -> None:
        probe = self._probes.pop(seq)  # type: ignore[call-overload]
        self._targets.pop(probe.target, None)
        for kind in (RETRY, INDIRECT, AGAIN, FAIL):
            self._context.timers.cancel(kind, seq)

    def retry(self, subject: object) -> None:
        context, config = self._context, self._context.config
        if (found := self._open(subject)) is not None:
            self._ping(subject, found[1])  # type: ignore[arg-type]
            left = config.indirect_after(context.roster.nodes) - config.retry_s
            context.arm(context.awareness.scale(left), INDIRECT, subject)

    def indirect(self, subject: object) -> None:
        """Once more, and through others, to whom our links are open."""
        context, config = self._context, self._context.config
        if (found := self._open(subject)) is None:
            return
        probe, member = found
        assert isinstance(subject, int)
        self._ping(subject, member)
        relays = [node for node in self._spreader.neighbours() if node != member.id]
        relays = context.rng.sample(relays, min(config.relays, len(relays)))
        probe.relays = len(relays)
        for node in relays:
            request = PingReq(subject, member.id, member.address.host, member.address.port, ())
            context.send(context.roster.members[node].address, request)
        nodes = context.roster.nodes
        left = context.awareness.scale(config.fail_after(nodes) - config.indirect_after(nodes))
        if probe.relays < config.relays:
            context.arm(left / 2, AGAIN, subject)
        context.arm(left, FAIL, subject)

    def again(self, subject: object) -> None:
        """Where there are hardly any others to ask, a direct question more."""
        if (found := self._open(subject)) is not None:
            self._ping(subject, found[1])  # type: ignore[arg-type]

    def fail(self, subject: object) -> None:
        """Nobody reached it. Relays that do not even say Nack speak for trouble on our side."""
        context = self._context
        if (found := self._open(subject)) is None:
            return
        probe, member = found
        self._close(subject)
        if member.state != SUSPECT:  # else it told us so before
            context.awareness.add(probe.relays - probe.nacks if probe.relays else 1)
        if probe.in_turn:
            self._isolation.note(member.id, False)
        self._merger.accuse(member)
        context.arm(context.config.reprobe_s, REPROBE, member.id)

    def reprobe(self, subject: object) -> None:
        """Our own suspect gets another chance each second."""
        member = self._context.roster.members.get(subject)  # type: ignore[call-overload]
        if member is not None and member.state == SUSPECT:
            self.now(member.id)

    def on_ack(self, ack: Ack) -> NodeId | None:
        """Returns the id that answered in place of, or in a later life of, the target; then a Sync should follow."""
        probe = self._probes.get(ack.seq)
        if probe is None:
            self._on_relayed(ack)
            return None
        self._close(ack.seq)
        member = self._context.roster.members[probe.target]
        self._context.awareness.add(-1)
        self.note_heard(probe.target)
        if ack.node == member.id and ack.epoch == member.version.epoch:
            if member.state == SUSPECT:
                self._context.arm(self._context.config.reprobe_s, REPROBE, member.id)
            return None
        if ack.epoch > member.version.epoch:
            self._merger.end_life(member, self._context.roster.id)
        return member.id

    def note_heard(self, node: str) -> None:
        """Proof that a peer can reach us; ends the doubt about ourselves in time."""
        self._isolation.note(node, True)
        if self._isolation.ended():
            self._merger.reassured()

    def on_nack(self, nack: Nack) -> None:
        probe = self._probes.get(nack.seq)
        if probe is not None:
            probe.nacks = min(probe.nacks + 1, probe.relays)

    def on_ping(self, ping: Ping, to: object, source: str) -> None:
        """Answer with who we are, whoever was meant; if the asker suspects us our refutation comes with it, and if we
        suspect the asker it learns of that on its own connection, which works."""
        local, asker = self._context.roster.local, self._context.roster.members.get(NodeId(source))
        first = None
        if any(record.id == local.id and record.state != ALIVE_CODE for record in ping.updates):
            first = whole_record(local, self._context.now)
        elif asker is not None and asker.state == SUSPECT:
            first = rumour(asker, SUSPECT, local.id)
        updates = self._spreader.piggyback(first)
        self._context.actions.append(Reply(to, Ack(ping.seq, local.id, local.version.epoch, updates)))

    def on_ping_request(self, request: PingReq, to: object) -> None:
        seq = self._context.number()
        relay = _Relay(to, request.seq, NodeId(request.target), Address(request.host, request.port))
        self._relays[seq] = relay
        self._relay_ping(seq, relay, self._context.config.nack_s)

    def _relay_ping(self, seq: int, relay: _Relay, patience_s: float) -> None:
        self._context.send(relay.address, Ping(seq, relay.target, ()))
        self._context.arm(patience_s, RELAY, seq)

    def relay_over(self, subject: object) -> None:
        """No answer yet: say so and try once more, as long as the asker may wait."""
        relay = self._relays.get(subject)  # type: ignore[call-overload]
        if relay is None:
            return
        assert isinstance(subject, int)
        if relay.nacked:
            del self._relays[subject]
            return
        relay.nacked = True
        self._context.actions.append(Reply(relay.to, Nack(relay.seq)))
        self._relay_ping(subject, relay, self._context.config.fail_large_s)

    def _on_relayed(self, ack: Ack) -> None:
        relay = self._relays.pop(ack.seq, None)
        if relay is not None:
            self._context.timers.cancel(RELAY, ack.seq)
            self._context.actions.append(Reply(relay.to, Ack(relay.seq, ack.node, ack.epoch, ())))
