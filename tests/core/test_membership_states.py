"""One test a (state, message) cell: the names of memberlist's state_test.go, as a checklist, and our own cells."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from support.membership import EPOCH, Peer, address, changes, member, node_id, record, sent, told

from p2pdyn.core.actions import Alarm, MemberChanged, Send
from p2pdyn.core.events import Announce, Introduced, Leave, LinkDown, ProbeNow, Tick
from p2pdyn.core.membership import MembershipConfig
from p2pdyn.core.membership_roster import CODES, whole_record
from p2pdyn.core.types import Address, Version
from p2pdyn.wire.control import BUCKETS, Ack, Gossip, Nack, Ping, PingReq, Sync, SyncPush, SyncReply

QUIET = MembershipConfig(probe_small_s=1000.0)
"""No probes of our own."""

NO_DIGESTS = bytes(8 * BUCKETS)


# Alive


def test_alive_new() -> None:
    peer = Peer(0)
    actions = peer.hear(record(5))
    assert changes(actions) == [("05", None, "alive")]
    assert peer.core.members[node_id(5)].address == address(5)
    assert record(5) in told(peer.run(1.0))


def test_alive_idempotent() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=3))
    assert peer.hear(record(1, incarnation=3)) == []


def test_alive_old() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=3))
    assert peer.hear(record(1, incarnation=2, info=b"old")) == []
    assert peer.core.members[node_id(1)].info == b"info"


def test_alive_newer_changes_info() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=1, info=b"new"))
    assert peer.core.members[node_id(1)].info == b"new"


def test_alive_suspect_node() -> None:
    peer = Peer()
    peer.hear(record(1, "suspect", origin=node_id(2)))
    assert peer.hear(record(1)) == []
    assert changes(peer.hear(record(1, incarnation=1))) == [("01", "suspect", "alive")]
    peer.run(30.0, answering=[1, 2, 3])
    assert peer.state(1) == "alive"


def test_alive_replay() -> None:
    """A dead node's old alive messages do not raise it."""
    peer = Peer()
    peer.hear(record(1, incarnation=4))
    peer.hear(record(1, "dead", incarnation=4, origin=node_id(2)))
    for incarnation in range(5):
        assert peer.hear(record(1, incarnation=incarnation)) == []
    assert peer.state(1) == "dead"


def test_alive_refute() -> None:
    """Somebody says more of us than we did: we say still more."""
    peer = Peer()
    peer.hear(record(0, incarnation=6, info=b"forged"))
    assert peer.core.local.version == Version(EPOCH, 7)
    assert peer.core.local.info == b"info"


def test_alive_own_record_is_ignored() -> None:
    assert Peer().hear(record(0)) == []


def test_alive_with_a_new_epoch_beats_any_incarnation() -> None:
    """memberlist#311: after a mass restart old high incarnations must not win."""
    peer = Peer()
    peer.hear(record(1, incarnation=900))
    assert changes(peer.hear(record(1, epoch=EPOCH + 1))) == [("01", "alive", "alive")]


# Suspect


def test_suspect_no_node() -> None:
    assert Peer().hear(record(9, "suspect", origin=node_id(2))) == []


def test_suspect_node_and_it_dies_in_time() -> None:
    peer = Peer(3)
    actions = peer.hear(record(1, "suspect", origin=node_id(2)))
    assert changes(actions) == [("01", "alive", "suspect")]
    longest = peer.config.suspicion_s * peer.config.suspicion_max
    peer.run(peer.config.suspicion_s - 0.1, answering=[2, 3])
    assert peer.state(1) == "suspect"
    assert ("01", "suspect", "dead") in changes(peer.run(longest, answering=[2, 3]))


def test_suspect_double() -> None:
    peer = Peer()
    peer.hear(record(1, "suspect", origin=node_id(2)))
    assert peer.hear(record(1, "suspect", origin=node_id(2))) == []


def test_suspect_old() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=10))
    assert peer.hear(record(1, "suspect", incarnation=9, origin=node_id(2))) == []


def test_suspect_of_a_dead_node() -> None:
    peer = Peer()
    peer.hear(record(1, "dead", origin=node_id(2)))
    assert peer.hear(record(1, "suspect", incarnation=5, origin=node_id(2))) == []


def test_suspect_refute() -> None:
    peer = Peer()
    actions = peer.hear(record(0, "suspect", origin=node_id(1)))
    assert peer.core.local.version == Version(EPOCH, 1)
    assert whole_record(peer.core.local, 0.0) in told(actions)
    assert peer.core.health == 1


def test_suspect_old_refute_is_not_repeated() -> None:
    peer = Peer()
    peer.hear(record(0, "suspect", origin=node_id(1)))
    assert changes(peer.hear(record(0, "suspect", origin=node_id(2)))) == []
    assert peer.core.local.version == Version(EPOCH, 1)


@pytest.mark.parametrize(("accusers", "dead_by"), [([2], 4.7), ([2, 3], 3.9), ([2, 3, 4], 3.4), ([2, 3, 4, 5], 3.1)])
def test_suspect_dogpile(accusers: list[int], dead_by: float) -> None:
    """Each independent accuser shortens the time, up to three besides the first."""
    peer = Peer(10, QUIET)
    for accuser in accusers:
        peer.hear(record(1, "suspect", origin=node_id(accuser)))
    peer.run(dead_by - 0.5, answering=[2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert peer.state(1) == "suspect"
    peer.run(0.5, answering=[2, 3, 4, 5, 6, 7, 8, 9, 10])
    assert peer.state(1) == "dead"


def test_confirmations_are_passed_on_once() -> None:
    peer = Peer(10, QUIET)
    peer.hear(record(1, "suspect", origin=node_id(2)))
    peer.run(2.0, answering=range(2, 11))
    peer.hear(record(1, "suspect", origin=node_id(3)))
    assert {r.origin for r in told(peer.run(0.5, answering=range(2, 11))) if r.id == node_id(1)} >= {node_id(3)}


# Dead


def test_dead_no_node() -> None:
    assert Peer().hear(record(9, "dead", origin=node_id(2))) == []


def test_dead_node() -> None:
    peer = Peer()
    actions = peer.hear(record(1, "dead", origin=node_id(2)))
    assert changes(actions) == [("01", "alive", "dead")]
    assert record(1, "dead", origin=node_id(2)) in told(peer.run(1.0))


def test_dead_double() -> None:
    peer = Peer()
    peer.hear(record(1, "dead", origin=node_id(2)))
    assert peer.hear(record(1, "dead", origin=node_id(3))) == []


def test_dead_old() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=10))
    assert peer.hear(record(1, "dead", incarnation=1, origin=node_id(2))) == []


def test_dead_alive_replay() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=10))
    peer.hear(record(1, "dead", incarnation=10, origin=node_id(2)))
    assert peer.hear(record(1, incarnation=10)) == []


def test_dead_refute() -> None:
    peer = Peer()
    actions = peer.hear(record(0, "dead", origin=node_id(1)))
    assert peer.core.local.version == Version(EPOCH, 1)
    assert [r.incarnation for r in told(actions)] == [1, 1, 1]


def test_dead_then_alive_again() -> None:
    peer = Peer()
    peer.hear(record(1, "dead", origin=node_id(2)))
    assert changes(peer.hear(record(1, incarnation=1))) == [("01", "dead", "alive")]


# Left


def test_leave_tells_all_and_still_answers() -> None:
    peer = Peer()
    actions = peer.do(Leave())
    assert [to for to, _ in sent(actions, Gossip)] == [address(1), address(2), address(3)]
    assert {(r.state, r.incarnation) for r in told(actions)} == {(CODES["left"], 1)}
    assert peer.core.local.state == "left"
    assert changes(peer.hear(record(0, "suspect", incarnation=1, origin=node_id(1)))) == []
    assert isinstance(peer.ask(Ping(1, node_id(0), ()))[0], Ack)
    assert not sent(peer.run(30.0), Ping)


def test_left_node_is_not_suspected_nor_probed() -> None:
    peer = Peer(1)
    assert changes(peer.hear(record(1, "left", incarnation=1))) == [("01", "alive", "left")]
    assert peer.hear(record(1, "suspect", incarnation=1, origin=node_id(2))) == []
    assert not sent(peer.run(10.0), Ping)


def test_dead_node_may_turn_out_to_have_left() -> None:
    peer = Peer()
    peer.hear(record(1, "dead", origin=node_id(2)))
    assert changes(peer.hear(record(1, "left", incarnation=1))) == [("01", "dead", "left")]


def test_left_node_rejoins_under_the_same_id() -> None:
    peer = Peer()
    peer.hear(record(1, "left", incarnation=1))
    assert changes(peer.hear(record(1, epoch=EPOCH + 1))) == [("01", "left", "alive")]


def test_left_node_is_forgotten_in_the_end() -> None:
    peer = Peer(2)
    peer.hear(record(1, "left", incarnation=1))
    peer.run(peer.config.left_forget_s + 60, answering=[2])
    assert peer.state(1) is None


# Probing


def test_probe_node() -> None:
    peer = Peer(1)
    actions = peer.run(0.3)
    [(to, ping), *_] = sent(actions, Ping)
    assert (to, ping.target) == (address(1), node_id(1))
    peer.answer(Ack(ping.seq, node_id(1), EPOCH, ()))
    assert peer.core.members[node_id(1)].last_seen == peer.now
    assert peer.state(1) == "alive"


def test_probe_node_suspect() -> None:
    """Asked three times and through others, then accused; it is told directly."""
    peer = Peer(1)
    actions = peer.run(2.0)
    assert len({ping.seq for _, ping in sent(actions, Ping)[:3]}) == 1
    assert ("01", "alive", "suspect") in changes(actions)
    assert (address(1), Gossip((record(1, "suspect", origin=node_id(0)),))) in sent(actions, Gossip)


def test_probe_round_reaches_everybody_once() -> None:
    peer = Peer(20)
    targets = [int(p.target, 16) for _, p in sent(peer.run(20 * 0.25 + 0.3, answering=range(1, 21)), Ping)]
    assert sorted(targets[:20]) == list(range(1, 21))


def test_probe_node_indirect() -> None:
    peer = Peer(5)
    requests: list[tuple[Address, PingReq]] = []
    while not requests:
        requests = sent(peer.run(0.1, answering=[2, 3, 4, 5]), PingReq)
    assert len({to for to, _ in requests}) == peer.config.relays
    assert {request.target for _, request in requests} == {node_id(1)}
    peer.answer(Ack(requests[0][1].seq, node_id(1), EPOCH, ()), source=2)
    assert peer.state(1) == "alive"


def test_probe_node_buddy() -> None:
    """The ping to a suspect carries the accusation."""
    peer = Peer(2)
    peer.hear(record(1, "suspect", origin=node_id(2)))
    pings = [p for _, p in sent(peer.run(1.0, answering=[2]), Ping) if p.target == node_id(1)]
    assert all(p.updates[0].id == node_id(1) and p.updates[0].state == CODES["suspect"] for p in pings)
    assert pings


def test_refutation_comes_with_the_answer() -> None:
    peer = Peer()
    [ack] = peer.ask(Ping(4, node_id(0), (record(0, "suspect", origin=node_id(1)),)))
    assert isinstance(ack, Ack)
    assert (ack.updates[0].id, ack.updates[0].incarnation) == (node_id(0), 1)
    [again] = peer.ask(Ping(5, node_id(0), (record(0, "suspect", origin=node_id(1)),)))
    assert isinstance(again, Ack)
    assert again.updates[0].incarnation == 1


def test_probe_node_awareness_degraded() -> None:
    """Relays that do not even say Nack speak for trouble of our own; probes slow down."""
    peer = Peer(5)
    peer.run(2.0)
    assert peer.core.health > 0


def test_probe_node_awareness_improved() -> None:
    peer = Peer(2)
    peer.hear(record(0, "suspect", origin=node_id(1)))
    assert peer.core.health == 1
    peer.run(2.0, answering=[1, 2])
    assert peer.core.health == 0


def test_probe_node_awareness_missed_nack() -> None:
    """All relays say Nack: the target is dead, not we slow."""
    peer = Peer(5)
    actions = peer.run(1.2, answering=[2, 3, 4, 5])
    requests = sent(actions, PingReq)
    assert len(requests) == 3
    for to, request in requests:
        peer.answer(Nack(request.seq), source=int(to.host.rpartition(".")[2]))
    peer.run(1.0, answering=[2, 3, 4, 5])
    assert peer.state(1) == "suspect"
    assert peer.core.health == 0


def test_a_suspect_that_fails_again_says_nothing_new_about_us() -> None:
    peer = Peer(1)
    peer.run(8.0)
    assert len({ping.seq for _, ping in sent(peer.actions, Ping)}) > 2
    assert peer.state(1) == "dead"
    assert peer.core.health == 1


def test_a_probe_of_a_former_life_does_not_accuse_the_next() -> None:
    peer = Peer(1)
    peer.run(1.0)
    peer.hear(record(1, epoch=EPOCH + 1))
    [old] = {ping.seq for _, ping in sent(peer.actions, Ping)}
    peer.run(0.7)
    assert peer.state(1) == "alive"
    assert old not in {ping.seq for _, ping in sent(peer.run(0.2), Ping)}


def test_a_newcomer_tells_a_small_cluster_of_itself_at_once() -> None:
    newcomer = Peer(0)
    [(_, sync)] = sent(newcomer.do(Introduced(address(1))), Sync)
    actions = newcomer.answer(SyncReply(sync.seq, 2**64 - 1, False, tuple(record(i) for i in range(1, 21))))
    assert {to for to, gossip in sent(actions, Gossip) if gossip.updates == (record(0),)} >= {
        address(i) for i in range(1, 21)
    }


def test_with_few_to_ask_the_target_is_asked_once_more() -> None:
    alone, among = Peer(1), Peer(5)
    for peer in (alone, among):
        peer.run(1.5, answering=range(2, 6))
    assert len([ping for _, ping in sent(alone.actions, Ping) if ping.seq == sent(alone.actions, Ping)[0][1].seq]) == 4
    first = next(ping.seq for _, ping in sent(among.actions, Ping) if ping.target == node_id(1))
    assert len([ping for _, ping in sent(among.actions, Ping) if ping.seq == first]) <= 3


def test_a_suspect_that_asks_is_told_so() -> None:
    """Our connection to it may be stuck; its own works."""
    peer = Peer()
    peer.hear(record(1, "suspect", origin=node_id(2)))
    [ack] = peer.ask(Ping(4, node_id(0), ()), source=1)
    assert isinstance(ack, Ack)
    assert (ack.updates[0].id, ack.updates[0].state) == (node_id(1), CODES["suspect"])
    [ack] = peer.ask(Ping(5, node_id(0), ()), source=2)
    assert isinstance(ack, Ack)
    assert node_id(1) not in {told.id for told in ack.updates} or ack.updates[0].origin == node_id(2)


def test_late_and_foreign_answers_do_no_harm() -> None:
    peer = Peer(2)
    assert changes(peer.answer(Ack(999, node_id(1), EPOCH, ()))) == []
    assert peer.answer(Nack(999)) == []


def test_relay() -> None:
    peer = Peer()
    actions = peer.ask(PingReq(7, node_id(2), address(2).host, 7400, ()), source=1)
    assert actions == []
    [(to, ping)] = sent(peer.actions, Ping)
    assert to == address(2)
    before = len(peer.actions)
    peer.answer(Ack(ping.seq, node_id(2), EPOCH, ()), source=2)
    [reply] = peer.actions[before:]
    assert reply.message == Ack(7, node_id(2), EPOCH, ())


def test_relay_nack() -> None:
    peer = Peer()
    peer.ask(PingReq(7, node_id(2), address(2).host, 7400, ()), source=1)
    assert Nack(7) in [a.message for a in peer.run(0.6, answering=[1, 3]) if hasattr(a, "message")]


def test_probe_now_goes_first() -> None:
    peer = Peer(20)
    [(to, ping)] = sent(peer.do(ProbeNow(node_id(7))), Ping)
    assert (to, ping.target) == (address(7), node_id(7))
    assert sent(peer.do(ProbeNow(node_id(7))), Ping) == []
    assert peer.do(ProbeNow(node_id(99))) == []


def test_link_down_probes_who_lives_there() -> None:
    peer = Peer(20)
    assert [to for to, _ in sent(peer.do(LinkDown(address(7))), Ping)] == [address(7)]
    assert peer.do(LinkDown(address(99))) == []


def test_somebody_else_answers_at_the_address() -> None:
    """New epoch at an address: the old one is dead at once, and the new one is asked who it is."""
    peer = Peer(1)
    [(_, ping), *_] = sent(peer.run(0.3), Ping)
    actions = peer.answer(Ack(ping.seq, node_id(9), EPOCH + 1, ()), source=9)
    assert ("01", "alive", "dead") in changes(actions)
    assert [to for to, _ in sent(actions, Sync)] == [address(1)]


def test_a_pause_of_our_own_proves_nothing() -> None:
    """SIGSTOP for a minute in the middle of a probe and a suspicion."""
    peer = Peer(3)
    peer.run(0.4)
    peer.hear(record(2, "suspect", origin=node_id(3)))
    peer.do(Tick(), peer.now + 60.0)
    assert {peer.state(i) for i in (1, 2, 3)} <= {"alive", "suspect"}
    assert peer.state(1) == "alive"
    peer.hear(record(2, incarnation=1))
    peer.run(5.0, answering=[1, 2, 3])
    assert {peer.state(i) for i in (1, 2, 3)} == {"alive"}


def test_most_peers_vanish_at_once() -> None:
    peer = Peer(8)
    peer.run(10.0, answering=range(1, 9))
    actions = peer.run(9.0)
    assert {state for _, _, state in changes(actions)} == {"suspect"}
    [alarm] = [action for action in actions if isinstance(action, Alarm)]
    assert alarm.kind == "isolated"
    assert peer.core.health == peer.config.awareness - 1
    after = []
    for index in range(1, 9):
        after += peer.hear(record(index, incarnation=1), source=index)
    after += peer.run(30.0, answering=range(1, 9))
    assert Alarm("isolated", "", 0.0) in after
    assert {peer.state(i) for i in range(1, 9)} == {"alive"}


def test_self_doubt_does_not_last_for_ever() -> None:
    peer = Peer(8)
    peer.run(5.0, answering=range(1, 9))
    peer.run(60.0)
    assert {peer.state(i) for i in range(1, 9)} == {"dead"}


# Gossip


def test_gossip_only_while_there_is_news() -> None:
    peer = Peer(40)
    peer.hear(record(1, incarnation=1))
    everyone = range(1, 41)
    assert sent(peer.run(3.0, answering=everyone), Gossip)
    assert not sent(peer.run(30.0, answering=everyone), Gossip)


def test_gossip_is_bounded() -> None:
    peer = Peer(40)
    peer.hear(*(record(i, incarnation=1, info=bytes(900)) for i in range(1, 41)))
    messages = [m for _, m in sent(peer.run(1.0, answering=range(1, 41)), Gossip)]
    assert messages
    assert all(sum(len(r.info) for r in m.updates) <= peer.config.gossip_bytes for m in messages)


def test_news_rides_on_probes_and_answers() -> None:
    peer = Peer(3)
    peer.hear(record(1, incarnation=1))
    [ack] = peer.ask(Ping(1, node_id(0), ()))
    assert isinstance(ack, Ack)
    assert record(1, incarnation=1) in ack.updates


def test_gossip_to_dead() -> None:
    """The dead are told that they are, and announced to for ever, so that they can come back."""
    peer = Peer(2)
    peer.hear(record(1, "dead", origin=node_id(2)))
    for _ in range(20):
        assert address(1) in [to for to, _ in sent(peer.run(2 * peer.config.heal_s, answering=[2]), Sync)]


def test_announce_tells_all_at_once() -> None:
    peer = Peer(31)
    actions = peer.do(Announce(b"ready"))
    assert {to for to, _ in sent(actions, Gossip)} == {address(i) for i in range(1, 32)}
    assert {(r.info, r.incarnation) for r in told(actions)} == {(b"ready", 1)}
    assert [a.member.info for a in actions if isinstance(a, MemberChanged)] == [b"ready"]


def test_announce_in_a_large_cluster_begins_at_once() -> None:
    peer = Peer(100)
    peer.do(Announce(b"ready"))
    assert len(sent(peer.run(0.01), Gossip)) == peer.config.fanout


# Sync


def test_join() -> None:
    peer = Peer(0)
    [(to, sync)] = sent(peer.do(Introduced(address(1))), Sync)
    assert to == address(1)
    assert sync.record == record(0)
    assert len(sync.digests) == 8 * BUCKETS
    actions = peer.answer(SyncReply(sync.seq, 2**64 - 1, False, (record(1), record(2))))
    assert changes(actions) == [("01", None, "alive"), ("02", None, "alive")]
    [(_, push)] = sent(actions, SyncPush)
    assert push.records == (record(0),)


def test_join_is_tried_again_for_ever() -> None:
    peer = Peer(0)
    peer.do(Introduced(address(1)))
    early = sent(peer.run(4.0), Sync)
    assert len(early) >= 3
    for _ in range(10):
        assert sent(peer.run(2 * peer.config.heal_s), Sync)


def test_introductions_of_oneself_and_of_the_living_cost_nothing() -> None:
    peer = Peer(1)
    assert peer.do(Introduced(address(0))) == []
    assert not sent(peer.do(Introduced(address(1))), Sync)


def test_push_pull() -> None:
    peer = Peer(3)
    [reply] = peer.ask(Sync(9, record(4), NO_DIGESTS), source=4)
    assert isinstance(reply, SyncReply)
    assert {r.id for r in reply.records} == {node_id(i) for i in range(5)}
    assert not reply.more
    assert peer.state(4) == "alive"


def test_push_pull_of_equal_views_carries_nothing() -> None:
    one, two = Peer(3), Peer(3)
    sync = Sync(9, record(0), one.core._context.roster.digests())
    two.core = type(two.core)(member(0, info=b"other"), two.config, random.Random(1))
    two.core.preload(member(i) for i in range(1, 4))
    [reply] = two.ask(replace(sync, record=record(1)), source=1)
    assert isinstance(reply, SyncReply)
    assert (reply.covered, reply.records) == (0, ())


def test_push_pull_pages() -> None:
    """A thousand members of 300 B each do not fit into one message: the asker asks until it has them all."""
    peer = Peer(0)
    peer.core.preload(replace(member(1), id=f"{i:016x}", address=address(i), info=bytes(300)) for i in range(1, 1000))
    peer.run(15.0, answering=range(1, 1000))  # a new node gives less
    joiner = Peer(0)
    joiner.core = type(peer.core)(member(2000), joiner.config, random.Random(1))
    [(_, sync)] = sent(joiner.do(Introduced(address(0))), Sync)
    for _ in range(60):
        [reply] = peer.ask(sync, source=2000)
        assert sum(len(r.info) for r in reply.records) <= peer.config.sync_bytes
        follow = sent(joiner.answer(reply, source=0), Sync)
        if not follow:
            break
        [(_, sync)] = follow
    assert len(joiner.core.members) == 1001


def test_answers_are_rationed() -> None:
    """Hundreds may ask at once; each at least learns of us."""
    peer = Peer(0)
    peer.core.preload(replace(member(1), id=f"{i:016x}", address=address(i), info=bytes(300)) for i in range(1, 1000))
    answers = [peer.ask(Sync(i, record(1), NO_DIGESTS))[0] for i in range(100)]
    given = sum(len(r.info) for reply in answers for r in reply.records)
    assert given <= peer.config.answer_burst + 100 * 20 * 300
    assert node_id(0) in {r.id for r in answers[-1].records}
    assert not answers[-1].more
    peer.run(60.0, answering=range(1, 1000))
    assert len(peer.ask(Sync(101, record(1), NO_DIGESTS))[0].records) > 100


def test_merge_state() -> None:
    """Another's view of the dead is only a suspicion here; of those unknown it is taken as it is."""
    peer = Peer(3)
    dead = replace(record(1), state=CODES["dead"])
    unknown = replace(record(8), state=CODES["dead"], age=30)
    left = replace(record(2, incarnation=1), state=CODES["left"])
    suspect = replace(record(3), state=CODES["suspect"])
    actions = peer.answer(SyncPush((dead, unknown, left, suspect, record(4))))
    assert changes(actions) == [
        ("01", "alive", "suspect"),
        ("08", None, "dead"),
        ("02", "alive", "left"),
        ("03", "alive", "suspect"),
        ("04", None, "alive"),
    ]
    assert peer.core.members[node_id(8)].since == peer.now - 30


def test_a_push_that_says_we_are_dead_is_answered_directly() -> None:
    peer = Peer(0)
    peer.answer(SyncPush((replace(record(1), state=CODES["dead"]),)))
    actions = peer.answer(SyncPush((replace(record(0), state=CODES["dead"]),)), source=1)
    assert peer.core.local.version.incarnation == 1
    assert (address(1), Gossip((whole_record(peer.core.local, 0.0),))) in sent(actions, Gossip)


def test_the_dead_are_limited() -> None:
    peer = Peer(0)
    dead = [replace(record(1), id=f"{i:016x}", state=CODES["dead"]) for i in range(1, 5000)]
    for start in range(0, len(dead), 500):
        peer.answer(SyncPush(tuple(dead[start : start + 500])))
    assert len(peer.core.members) == peer.config.dead_max + 1


def test_snapshot() -> None:
    peer = Peer(3)
    peer.hear(record(1, "suspect", origin=node_id(2)))
    wanted = {"nodes": 4, "suspects": [node_id(1)], "health": 0, "isolated": False, "news": 1, "paused_s": 0.0}
    assert peer.core.snapshot() == wanted


def test_sends_are_frozen_values() -> None:
    """Actions compare as a whole list."""
    assert Peer(1).do(ProbeNow(node_id(1))) == Peer(1).do(ProbeNow(node_id(1)))
    assert isinstance(Peer(1).do(ProbeNow(node_id(1)))[0], Send)
