"""Constants of the membership protocol: unit, reason, bound. docs/design/membership.md has the figures behind them."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MembershipConfig:
    """Defaults hold from 2 to 1000 nodes; ``p2pdyn bench membership`` prints them with what they give."""

    small: int = 32
    """Nodes up to which every link stays open: own news goes to all at once, probes are frequent."""

    probe_small_s: float = 0.25
    probe_large_s: float = 0.55
    """Seconds between two probes of one node. A target waits for its first probe 1 interval on average, 4.6 at p99."""

    retry_s: float = 0.3
    """Second Ping. Above a LAN round trip by far, above TCP's least retransmission time (0.2 s)."""

    indirect_small_s: float = 0.6
    indirect_large_s: float = 1.2
    """Third Ping, and PingReqs. Small: after one retransmission each way on an open link. Large: the link must first be
    opened, so after TCP's second SYN (1 s); a PingReq opens another, and that costs more bytes than all else."""

    fail_small_s: float = 1.5
    fail_large_s: float = 2.6
    """A probe without answer has failed. In a large cluster it may have to open a connection first, and the indirect
    ones must outlast the 1 s that TCP waits before it repeats a lost SYN."""

    relays: int = 3
    """Peers asked for an indirect probe."""

    nack_s: float = 0.5
    """A relay repeats its ping and says Nack after this long: it must still reach the asker before its fail time."""

    awareness: int = 8
    """Local health scores 0 .. awareness - 1."""

    suspicion_s: float = 3.0
    """Shortest suspicion up to ``small`` nodes: a live one must hear of it, refute and be heard, at full CPU load."""

    suspicion_max: float = 1.5
    """Longest over shortest suspicion: what an unconfirmed one gets."""

    confirmations: int = 3
    """Origins besides the first that bring a suspicion to its shortest."""

    last_word_s: float = 1.5
    """Before its own suspicion of somebody ends a node asks the suspect itself. One node in ten thousand misses a
    refutation that gossip spreads; without this question it would declare a false death."""

    reprobe_s: float = 1.0
    """The accuser probes its suspect again this often, with the accusation on it."""

    gossip_s: float = 0.2
    """Between two gossip rounds while there is news."""

    fanout: int = 3
    """Neighbours a round."""

    rings: int = 8
    """Beyond ``small`` nodes: how many each node watches, is watched by, and tells its news. At most 8."""

    retransmit: float = 1.4
    """A record leaves each node ceil(retransmit * ln(N + 1)) times: 10 at 1000 nodes, 9 arrive at 10 % loss."""

    piggyback_bytes: int = 1200
    """Records on a Ping or Ack: it stays within one packet."""

    gossip_bytes: int = 4096
    """Records in a Gossip. It bounds a storm to 3 * 4096 / 0.2 s = 61 kB/s a node, for as long as the queue lasts."""

    sync_s: float = 15.0
    """Between two Syncs with a neighbour."""

    sync_first_s: float = 1.0
    """The same for a new node; doubles up to sync_s. A node that joins among many others misses much of the gossip."""

    newcomer_s: float = 10.0
    """A node that ran shorter than this does not tell on what a large Sync answer taught it: to all others it is
    no news, and 1000 records told ten times are 3 MB."""

    sync_bytes: int = 48 * 1024
    """Records in a SyncReply or SyncPush; control messages are at most 64 kB."""

    answer_burst: int = 512 * 1024
    answer_rate: int = 32 * 1024
    """Bytes, and bytes/s, of records that a node gives in answers. Above it the answer is a few records: a node that
    comes back to a cluster of 1000 is asked by hundreds at once, each of whom lacks nothing but the node itself."""

    sync_pages: int = 32
    """Most SyncReplies in one conversation: 5000 members of 300 B; it ends a conversation that makes no progress."""

    answer_first: int = 128 * 1024
    """Of those, a new node may give this much at once: until all know it, many ask it for nothing but itself."""

    heal_s: float = 5.0
    """Between two Syncs to introduced addresses that are no member, and dead members, in turn."""

    heal_nodes: int = 128
    """Beyond this many nodes that time grows in proportion: all together send 25 Syncs a second, at any N. Each dead
    address gets its share of them when it comes back."""

    join_s: float = 0.5
    """First repetition of a Sync to an introduced address; doubles up to heal_s, then the address waits its turn."""

    introduced_max: int = 1024
    """Addresses remembered; the oldest goes first."""

    dead_max: int = 4096
    """Dead and left members remembered; the longest dead goes first."""

    left_forget_s: float = 3600.0
    """A member that left is forgotten after this long."""

    claim_s: float = 1.5
    """How long the holder of an id has to answer when another address claims it."""

    claim_age_s: float = 10.0
    """A node that ran shorter than this never calls itself the older holder of its id."""

    reject_s: float = 600.0
    """How long a refused claim is remembered and the alarm shown."""

    isolation_window: int = 12
    """Probes looked at before declaring a death."""

    isolation_least: int = 3
    """Targets that must have failed before this node doubts itself."""

    isolation_hold_s: float = 15.0
    """How long deaths are held while this node doubts itself."""

    pause_s: float = 0.5
    """Called later than this after a deadline, the process was paused: its time stood still meanwhile."""

    def probe_interval(self, nodes: int) -> float:
        return self.probe_small_s if nodes <= self.small else self.probe_large_s

    def indirect_after(self, nodes: int) -> float:
        return self.indirect_small_s if nodes <= self.small else self.indirect_large_s

    def fail_after(self, nodes: int) -> float:
        return self.fail_small_s if nodes <= self.small else self.fail_large_s

    def heal_interval(self, nodes: int) -> float:
        return self.heal_s * max(1.0, nodes / self.heal_nodes)

    def suspicion_min(self, nodes: int) -> float:
        """Seconds. Grows with the time that a rumour takes to spread, which is logarithmic."""
        return self.suspicion_s * (1 + math.log10(max(1.0, nodes / self.small)) / 5)
