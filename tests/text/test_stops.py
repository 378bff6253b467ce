from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pdyn.text.stops import StopMatcher

STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def plain(text: str, stops: list[str]) -> tuple[str, bool]:
    """One character at a time, with the whole text kept: what the matcher must be equal to."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(deadline=None)
@given(st.lists(st.text("abc\n", max_size=5), max_size=12), STOPS)
def test_the_token_borders_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    matcher, said = StopMatcher(stops), ""
    expected, found = plain("".join(pieces), stops)
    for piece in pieces:
        said += matcher.push(piece)
        assert expected.startswith(said)  # nothing is said that must be taken back
        if matcher.found:
            break
    assert matcher.found == found
    assert said + matcher.finish() == expected


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert [matcher.push(piece) for piece in ("go S", "Tx", " ST", "O", "P!")] == ["go ", "STx", " ", "", ""]
    assert matcher.found
