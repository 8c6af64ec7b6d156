"""Tokens to text one by one, and stop texts: against the whole text at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.engine.text import UNFINISHED, Detokenizer, find_stop, held_back


def of_bytes(ids):
    return bytes(ids).decode("utf-8", "replace")


def of_words(ids):
    """As tokenizers do that mark the beginning of a word: the first loses its space."""
    return "".join(" " + "abc"[i] if i < 3 else "xyz"[i - 3] for i in ids).removeprefix(" ")


def pushed(decode, ids):
    detokenizer, texts = Detokenizer(decode), []
    for token in ids:
        detokenizer.push(token)
        texts.append(detokenizer.text)
    detokenizer.finish()
    return texts, detokenizer.text


@pytest.mark.parametrize("text", ["plain", "naïve", "日本 🙂🙂", "é", ""])
def test_characters_come_whole(text):
    texts, final = pushed(of_bytes, text.encode())
    assert final == text
    assert not any(UNFINISHED in part for part in texts)
    expected = [text.encode()[:n].decode("utf-8", "ignore") for n in range(1, len(texts) + 1)]
    assert texts == expected  # each character as soon as it is whole


@given(st.binary(max_size=30))
def test_any_bytes_end_at_the_whole_text(data):
    texts, final = pushed(of_bytes, data)
    assert final == of_bytes(data)
    for text in texts:
        assert final.startswith(text) and not text.endswith(UNFINISHED)


@given(st.lists(st.integers(0, 5), max_size=20))
def test_spaces_between_words_are_kept(ids):
    texts, final = pushed(of_words, ids)
    assert final == of_words(ids)
    assert texts == [of_words(ids[: n + 1]) for n in range(len(ids))]


def test_an_end_without_the_rest_of_a_character():
    texts, final = pushed(of_bytes, "a🙂".encode()[:-1])
    assert texts == ["a"] * 4 and final == "a" + UNFINISHED


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(STOPS, st.text("ab", max_size=12))
def test_a_stop_is_found_as_soon_as_it_is_there_and_never_shown(stops, text):
    """Letter by letter, as a stream goes."""
    first = next(
        (n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stops)), None
    )
    shown = ""
    for n in range(1, len(text) + 1):
        found = find_stop(text[:n], n - 1, stops)
        assert (found is not None) == (n == first)
        if found is not None:
            at, stop = found
            assert text[at:n] == stop
            assert shown == text[: len(shown)] and len(shown) <= at
            return
        shown = text[: n - held_back(text[:n], stops)]
        assert not any(stop in shown for stop in stops)


def test_what_cannot_be_a_stop_is_not_held_back():
    assert held_back("abc", ["cde", "bcd"]) == 2
    assert held_back("abc", ["x"]) == held_back("", ["abc"]) == held_back("abc", []) == 0
    assert find_stop("aab", 2, []) is None
    assert find_stop("xabcab", 4, ["b", "abc"]) == (5, "b")
