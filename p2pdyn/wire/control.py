"""The control link: membership. Kinds below 16 are the header and admin commands.

An answer (Ack, Nack, SyncReply) goes back on the connection that the question came in on, so a prober needs one DEALER
to its target and the target none.  All else is sent on the sender's own DEALER.  Updates ride on probes and answers;
``Gossip`` carries them when there is something to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from p2pdyn.constants import PEER_INFO_MAX
from p2pdyn.wire.schema import CONTROL, U16, U32, U64, Bound, Cap, Host, IdStr, message

ALIVE_CODE, SUSPECT_CODE, DEAD_CODE, LEFT_CODE = range(4)

MAX_UPDATES = 512
"""Records in one message. Senders stop at bytes long before; the cap bounds a hostile message."""

BUCKETS = 64
"""A Sync compares views by one 64-bit digest for each of this many sets of members."""


@dataclass(frozen=True, slots=True)
class Record:
    """One statement about one member: the unit of gossip.

    ``state`` is one of the four codes above. Statements that a member is suspect or dead carry ``origin`` (whose probe
    failed; confirmations count distinct origins) and, as rumours, no address and no info: who does not know the member
    needs no rumour of its death. Statements in a Sync are whole. ``age`` is the seconds since death or leave.
    """

    id: IdStr
    epoch: U64
    incarnation: U32
    state: Annotated[int, Bound(0, 3)]
    origin: IdStr
    host: Host
    port: U16
    info: Annotated[bytes, Cap(PEER_INFO_MAX)]
    age: U32


Updates = Annotated[tuple[Record, ...], Cap(MAX_UPDATES)]


@message(CONTROL, 16)
@dataclass(frozen=True, slots=True)
class Ping:
    """Are you ``target``? Whoever listens there answers with an :class:`Ack` that names itself."""

    seq: U32
    target: IdStr
    updates: Updates


@message(CONTROL, 17)
@dataclass(frozen=True, slots=True)
class Ack:
    """Answer to a Ping, or, relayed, to a PingReq: ``node`` of ``epoch`` is alive and listens at the address probed."""

    seq: U32
    node: IdStr
    epoch: U64
    updates: Updates


@message(CONTROL, 18)
@dataclass(frozen=True, slots=True)
class PingReq:
    """Ping ``target`` at ``host``:``port`` for me and tell me: Ack, or Nack if it does not answer in time."""

    seq: U32
    target: IdStr
    host: Host
    port: U16
    updates: Updates


@message(CONTROL, 19)
@dataclass(frozen=True, slots=True)
class Nack:
    """I work, but the target of PingReq ``seq`` has not answered me: it tells a slow prober from a dead target."""

    seq: U32


@message(CONTROL, 20)
@dataclass(frozen=True, slots=True)
class Gossip:
    updates: Updates


@message(CONTROL, 21)
@dataclass(frozen=True, slots=True)
class Sync:
    """Compare views: ``digests`` is 64 little-endian u64, one a bucket. ``record`` is the sender's own, so that a Sync
    is also how a node joins, and how the two halves of a healed partition meet."""

    seq: U32
    record: Record
    digests: Annotated[bytes, Cap(8 * BUCKETS)]


@message(CONTROL, 22)
@dataclass(frozen=True, slots=True)
class SyncReply:
    """All that the answerer holds in ``covered`` (a bit a bucket), which are those whose digests differ, until the
    message is full. ``more``: others differ too; ask again when these are merged."""

    seq: U32
    covered: U64
    more: bool
    records: Updates


@message(CONTROL, 23)
@dataclass(frozen=True, slots=True)
class SyncPush:
    """The other direction: what the asker holds newer than, or besides, the records of a SyncReply."""

    records: Updates


@message(CONTROL, 24)
@dataclass(frozen=True, slots=True)
class Conflict:
    """Two live peers use ``node`` as id. The keeper answered a direct probe and keeps it; the newcomer must stop."""

    node: IdStr
    keeper_host: Host
    keeper_port: U16
    newcomer_host: Host
    newcomer_port: U16
    newcomer_epoch: U64
