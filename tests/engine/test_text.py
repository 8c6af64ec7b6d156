"""Incremental detokenization and stop texts, against the whole text at once."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as SplitBytes
from transformers import PreTrainedTokenizerFast

from llmfast.engine.text import UNFINISHED, Decoder, Detokenizer, find_stop, held_back


def of_bytes(ids):
    return bytes(ids).decode("utf-8", "replace")


def of_words(ids):
    """Decode as tokenizers do that mark the beginning of a word: the first loses its space."""
    return "".join(" " + "abc"[i] if i < 3 else "xyz"[i - 3] for i in ids).removeprefix(" ")


def pushed(decode, ids, whole=None):
    detokenizer, texts = Detokenizer(decode, whole), []
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


@given(st.lists(st.sampled_from(["a", "é", "日", "🙂"]), max_size=8), st.binary(max_size=5))
def test_texts_of_single_tokens_change_nothing_where_they_can_be_joined(letters, more):
    data = "".join(letters).encode() + more
    whole = {byte: chr(byte) if byte < 128 else None for byte in range(256)}
    assert pushed(of_bytes, data, whole.get) == pushed(of_bytes, data)


def byte_tokenizer():
    backend = Tokenizer(BPE({byte: i for i, byte in enumerate(SplitBytes.alphabet())}, []))
    backend.pre_tokenizer = SplitBytes(add_prefix_space=False)
    backend.decoder = ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


class Spy:
    """A tokenizer that notes what it decodes."""

    def __init__(self, tokenizer):
        self.backend_tokenizer = tokenizer.backend_tokenizer
        self.decoded = []
        self._tokenizer = tokenizer

    def __len__(self):
        return len(self._tokenizer)

    def decode(self, tokens, **options):
        assert options == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        self.decoded.append(list(tokens))
        return self._tokenizer.decode(tokens, **options)


def test_a_token_of_bytes_is_decoded_once():
    spy = Spy(byte_tokenizer())
    decoder = Decoder(spy)
    spy.decoded.clear()
    ids = spy._tokenizer.encode("a naïve cat", add_special_tokens=False)
    for _ in range(2):
        detokenizer = decoder.detokenizer()
        for token in ids:
            detokenizer.push(token)
        detokenizer.finish()
        assert detokenizer.text == decoder(ids) == "a naïve cat"
    singles = [tokens for tokens in spy.decoded if len(tokens) == 1]
    assert len(singles) == len({tuple(tokens) for tokens in singles})


def test_other_tokenizers_are_asked_for_tokens_with_those_before():
    class Words(Spy):
        backend_tokenizer = SimpleNamespace(decoder=None)

        def __init__(self):
            self.decoded = []

        def decode(self, tokens, **options):
            self.decoded.append(list(tokens))
            return of_words(tokens)

    class Spaced(Words):
        """A tokenizer that claims to be of bytes, and is not."""

        backend_tokenizer = SimpleNamespace(decoder=ByteLevel())

        def __len__(self):
            return 6

    for tokenizer in (Words(), Spaced()):
        detokenizer = Decoder(tokenizer).detokenizer()
        for token in (0, 1, 3, 2):
            detokenizer.push(token)
        assert detokenizer.text == of_words([0, 1, 3, 2]) == "a bx c"


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
    """Push a text letter by letter, as a stream does."""
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
