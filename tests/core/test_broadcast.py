"""The queue of news."""

from __future__ import annotations

from support.membership import record

from p2pdyn.core.broadcast import Broadcasts, record_size, retransmit_limit


def test_limit_grows_with_the_logarithm() -> None:
    assert [retransmit_limit(1.4, nodes) for nodes in (1, 2, 32, 100, 1000, 10000)] == [1, 2, 5, 7, 10, 13]


def test_newest_wins() -> None:
    news = Broadcasts()
    news.put(record(1, "suspect"))
    news.put(record(1, incarnation=1))
    assert news.take(10_000, 3) == (record(1, incarnation=1),)


def test_each_leaves_a_limited_number_of_times() -> None:
    news = Broadcasts()
    news.put(record(1))
    assert [len(news.take(10_000, 3)) for _ in range(5)] == [1, 1, 1, 0, 0]


def test_copies_count() -> None:
    news = Broadcasts()
    news.put(record(1))
    assert [len(news.take(10_000, 5, copies=3)) for _ in range(3)] == [1, 1, 0]


def test_least_sent_first_then_newest() -> None:
    news = Broadcasts()
    for index in (1, 2):
        news.put(record(index))
    room = record_size(record(1))
    assert [news.take(room, 9)[0].id[-1] for _ in range(2)] == ["2", "1"]
    news.put(record(3))
    assert [record.id[-1] for record in news.take(10 * room, 9)] == ["3", "2", "1"]


def test_a_large_record_does_not_keep_small_ones_back() -> None:
    news = Broadcasts()
    news.put(record(2, "suspect"))
    news.put(record(1, info=bytes(1000)))
    assert [r.id[-1] for r in news.take(500, 3)] == ["2"]
    assert news.take(record_size(record(2, "suspect")) - 1, 3) == ()
