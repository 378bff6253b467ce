"""Bodies that would cost far more than their size are refused by what they hold; all others are read as before."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pdyn.http import jsonbody
from p2pdyn.http.errors import HttpError
from p2pdyn.http.jsonbody import MAX_CONTAINERS, MAX_STRINGS, MAX_VALUES, UNCOUNTED, load_object


def refusal(body: bytes) -> HttpError:
    with pytest.raises(HttpError) as caught:
        load_object(body)
    return caught.value


@pytest.mark.parametrize(
    ("item", "count", "what"),
    [
        (b"[]", MAX_CONTAINERS, "lists and objects"),
        (b"{}", MAX_CONTAINERS, "lists and objects"),
        (b'""', MAX_STRINGS, "strings"),
        (b"1", MAX_VALUES + 1, "values"),
    ],
)
def test_a_body_of_very_many_small_things_is_refused_before_it_is_parsed(item: bytes, count: int, what: str) -> None:
    error = refusal(b'{"metadata":[' + b",".join([item] * (count + 1)) + b"]}")
    assert (error.status, error.code) == (413, "body_too_large")
    assert error.message.endswith(f"{what}; send fewer.")


def test_text_may_hold_as_many_brackets_commas_and_quotes_as_it_likes() -> None:
    text = '[{"a": [],}, \\ "\n' * 100_000
    assert load_object(json.dumps({"prompt": text}).encode()) == {"prompt": text}
    assert load_object(json.dumps({"prompt": list(range(200_000))}).encode())["prompt"][-1] == 199_999


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(st.dictionaries(st.text(), JSON))
def test_what_is_counted_is_what_is_there(content: dict[str, object]) -> None:
    """With limits of exactly what the body holds it passes; with one less of either it does not."""

    def size(value: object) -> tuple[int, int]:
        if isinstance(value, dict):
            sizes = [(1, 0), *((0, 1) for _ in value), *map(size, value.values())]
        elif isinstance(value, list):
            sizes = [(1, 0), *map(size, value)]
        else:
            sizes = [(0, int(isinstance(value, str)))]
        return sum(one for one, _ in sizes), sum(two for _, two in sizes)

    containers, strings = size(content)
    body = json.dumps(content).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonbody, "UNCOUNTED", 0)
        patch.setattr(jsonbody, "MAX_CONTAINERS", containers)
        patch.setattr(jsonbody, "MAX_STRINGS", strings)
        assert load_object(body) == content
        patch.setattr(jsonbody, "MAX_CONTAINERS", containers - 1)
        assert refusal(body).status == 413
        if strings:
            patch.setattr(jsonbody, "MAX_STRINGS", strings - 1)
            assert refusal(body).status == 413


@given(st.binary(max_size=200))
def test_no_bytes_break_the_count(noise: bytes) -> None:
    body = b'{"a":"' + noise + b" " * UNCOUNTED
    assert refusal(body).status in (400, 413)
