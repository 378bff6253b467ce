"""How news travels: on probes and answers for free, and in rounds to a few neighbours while there is any."""

from __future__ import annotations

from p2pdyn.core.broadcast import Broadcasts, record_size, retransmit_limit
from p2pdyn.core.membership_context import Context
from p2pdyn.core.types import NodeId
from p2pdyn.wire.control import Gossip, Record

ROUND = "gossip"


class Spreader:
    """The news queue and the neighbours that it is told to."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.news = Broadcasts()
        self._turn = 0
        self._limit = (0, 1)
        self.muted = False
        """What is learned now is known to all but us."""

    def tell(self, record: Record, own: bool = False) -> None:
        """Queue news. A node's ``own`` news (of itself, of its probes) goes to all at once if they are few."""
        context = self._context
        if self.muted and not own:
            return
        self.news.put(record)
        if own and context.roster.nodes <= context.config.small:
            self.tell_all(record)
        if not context.timers.armed(ROUND):
            context.arm(0.0 if own else context.config.gossip_s, ROUND)

    def tell_all(self, record: Record) -> None:
        members = self._context.roster.members
        for node in self._context.roster.live:
            self._context.send(members[node].address, Gossip((record,)))

    def piggyback(self, first: Record | None = None) -> tuple[Record, ...]:
        """News for a message that is sent anyway; ``first`` goes before all else."""
        room = self._context.config.piggyback_bytes
        if first is None:
            return self.news.take(room, self.limit()) if self.news else ()
        rest = self.news.take(room - record_size(first), self.limit())
        return (first, *(record for record in rest if record.id != first.id))

    def limit(self) -> int:
        """How often a record leaves this node."""
        nodes = self._context.roster.nodes
        if self._limit[0] != nodes:
            self._limit = (nodes, retransmit_limit(self._context.config.retransmit, nodes))
        return self._limit[1]

    def round(self, _: object = None) -> None:
        """One gossip round; the next is due while news is left."""
        context, config = self._context, self._context.config
        neighbours = self.neighbours()
        if not self.news or not neighbours:
            return
        targets = [neighbours[(self._turn + i) % len(neighbours)] for i in range(min(config.fanout, len(neighbours)))]
        self._turn = (self._turn + len(targets)) % len(neighbours)
        message = Gossip(self.news.take(config.gossip_bytes, self.limit(), len(targets)))
        for node in targets:
            context.send(context.roster.members[node].address, message)
        if self.news:
            context.arm(config.gossip_s, ROUND)

    def neighbours(self) -> list[NodeId]:
        """Everybody in a small cluster, else one's subjects: their links are open, so nothing waits for a handshake."""
        roster = self._context.roster
        return roster.live if roster.nodes <= self._context.config.small else roster.rings.subjects()
