"""Epochs, versions, and two live peers with one id."""

from __future__ import annotations

import pytest
from support.membership import EPOCH, Peer, address, changes, node_id, record, sent

from p2pdyn.core.actions import Alarm, Fatal, MemberChanged
from p2pdyn.core.events import LinkDown, Tick
from p2pdyn.core.identity import above, next_epoch
from p2pdyn.core.types import Version
from p2pdyn.wire.control import Ack, Conflict, Ping, Sync

ELSEWHERE = {"host": "10.0.9.9"}


@pytest.mark.parametrize(
    ("persisted", "wall", "expected"), [(None, 500, 500), (10, 500, 500), (700, 500, 701), (500, 500, 501), (0, 0, 1)]
)
def test_epochs_grow_though_the_clock_goes_back_or_the_disk_is_lost(
    persisted: int | None, wall: int, expected: int
) -> None:
    assert next_epoch(persisted, wall) == expected


@pytest.mark.parametrize(
    ("mine", "seen", "expected"),
    [((5, 2), (5, 2), (5, 3)), ((5, 2), (5, 9), (5, 10)), ((5, 2), (4, 9), (5, 10)), ((5, 2), (6, 9), (7, 0))],
)
def test_above_beats_both(mine: tuple[int, int], seen: tuple[int, int], expected: tuple[int, int]) -> None:
    result = above(Version(*mine), Version(*seen))
    assert result == Version(*expected)
    assert result > max(Version(*mine), Version(*seen))


def claim(peer: Peer) -> int:
    """A newer life of peer 1 appears elsewhere; the number of the probe to the known address."""
    actions = peer.hear(record(1, epoch=EPOCH + 1, **ELSEWHERE), source=2)
    [(to, ping)] = sent(actions, Ping)
    assert to == address(1)
    assert not changes(actions)
    return ping.seq


def test_the_older_holder_keeps_the_id_if_it_answers() -> None:
    peer = Peer()
    seq = claim(peer)
    actions = peer.answer(Ack(seq, node_id(1), EPOCH, ()))
    assert {to.host for to, _ in sent(actions, Conflict)} == {"10.0.0.1", "10.0.9.9"}
    [alarm] = [action for action in actions if isinstance(action, Alarm)]
    assert (alarm.kind, alarm.for_s) == ("duplicate-id", 600.0)
    assert "10.0.0.1:7400" in alarm.text
    assert "10.0.9.9:7400" in alarm.text
    assert "--data-dir" in alarm.text
    assert not changes(peer.hear(record(1, epoch=EPOCH + 1, incarnation=4, **ELSEWHERE), source=2))
    assert peer.core.members[node_id(1)].address == address(1)


def test_the_newcomer_has_the_id_if_the_holder_is_silent() -> None:
    peer = Peer()
    claim(peer)
    actions = peer.run(1.6, answering=[2, 3])
    assert ("01", "alive", "alive") in changes(actions)
    assert peer.core.members[node_id(1)].address.host == "10.0.9.9"


def test_a_refused_connection_decides_at_once() -> None:
    peer = Peer()
    claim(peer)
    assert changes(peer.do(LinkDown(address(1)))) == [("01", "alive", "alive")]


def test_a_restart_at_the_same_address_is_no_claim() -> None:
    peer = Peer()
    assert changes(peer.hear(record(1, epoch=EPOCH + 1))) == [("01", "alive", "alive")]


def test_old_news_of_a_moved_node_is_no_claim() -> None:
    peer = Peer()
    assert peer.hear(record(1, epoch=EPOCH - 1, **ELSEWHERE)) == []


def test_the_newcomer_stops_and_says_why() -> None:
    peer = Peer()
    actions = peer.answer(Conflict(node_id(0), "10.0.9.9", 7400, "10.0.0.0", 7400, EPOCH))
    [fatal] = [action for action in actions if isinstance(action, Fatal)]
    assert "10.0.9.9:7400" in fatal.text
    assert "10.0.0.0:7400" in fatal.text
    assert "--data-dir" in fatal.text
    assert peer.core.handle(Tick(), 5.0) == []
    assert peer.core.next_deadline() is None


def test_the_keeper_only_shows_it() -> None:
    peer = Peer()
    actions = peer.answer(Conflict(node_id(0), "10.0.0.0", 7400, "10.0.9.9", 7400, EPOCH + 1))
    assert [type(action) for action in actions] == [Alarm]


def test_a_conflict_of_another_boot_is_ignored() -> None:
    peer = Peer()
    actions = peer.answer(Conflict(node_id(0), "10.0.9.9", 7400, "10.0.0.0", 7400, EPOCH - 1))
    assert not [action for action in actions if isinstance(action, Fatal)]


def test_a_holder_that_was_cut_off_meanwhile_claims_its_id() -> None:
    peer = Peer()
    peer.hear(record(1, incarnation=1))
    peer.run(11.0, answering=[1, 2, 3])
    actions = peer.hear(record(0, epoch=EPOCH + 1, **ELSEWHERE))
    [(to, conflict)] = sent(actions, Conflict)
    assert to.host == "10.0.9.9"
    assert (conflict.keeper_host, conflict.newcomer_epoch) == ("10.0.0.0", EPOCH + 1)
    assert peer.core.local.version == Version(EPOCH, 0)
    peer.hear(record(0, "dead", epoch=EPOCH + 1))
    assert peer.core.local.version > Version(EPOCH + 1, 0)


def test_a_new_node_whose_clock_is_behind_does_not_evict_the_holder() -> None:
    peer = Peer()
    assert not sent(peer.hear(record(0, epoch=EPOCH + 1, **ELSEWHERE)), Conflict)


def test_a_second_node_with_a_lower_epoch_is_found_when_it_speaks_itself() -> None:
    peer = Peer()
    actions = peer.ask(Sync(1, record(1, epoch=EPOCH - 1, **ELSEWHERE), b""))
    assert len(actions) == 1
    [(to, ping)] = sent(peer.actions, Ping)
    assert to == address(1)
    peer.answer(Ack(ping.seq, node_id(1), EPOCH, ()))
    assert {to.host for to, _ in sent(peer.actions, Conflict)} == {"10.0.0.1", "10.0.9.9"}


def test_a_life_above_ours_at_our_own_address_is_outbid() -> None:
    """The clock went back and the disk was lost."""
    peer = Peer()
    [change] = [
        a for a in peer.hear(record(0, "dead", epoch=EPOCH + 50, incarnation=3)) if isinstance(a, MemberChanged)
    ]
    assert change.member.version == Version(EPOCH + 51, 0)


def test_another_id_with_a_higher_epoch_at_an_address_ends_the_old_one() -> None:
    peer = Peer()
    actions = peer.hear(record(9, epoch=EPOCH + 1, host="10.0.0.1"))
    assert changes(actions) == [("01", "alive", "dead"), ("09", None, "alive")]


def test_an_older_id_at_an_address_is_not_taken() -> None:
    peer = Peer()
    assert changes(peer.hear(record(9, epoch=EPOCH - 1, host="10.0.0.1"))) == []
