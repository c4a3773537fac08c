"""From ids to text: whole characters, stop texts held back, special tokens left out."""

import pytest

from puna.core.errors import PunaError
from puna.lm.text import StopTexts, TextState
from puna.tokens import bpe
from puna.tokens.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """256 bytes and the special tokens, no merges."""
    return Tokenizer(bpe.definition(bpe.train_ranks([], 256, 1), 12), bpe.tokenizer_config())


def say(state: TextState, ids: list[int], finish_with_last: bool = True) -> list[str]:
    """Pieces of text; the last id comes with the end, or the end comes alone."""
    shown = []
    for place, id_ in enumerate(ids):
        piece, stopped = state.push(id_, finish_with_last and place == len(ids) - 1)
        shown.append(piece)
        if stopped:
            return shown
    if not finish_with_last:
        shown.append(state.push(None, True)[0])
    return shown


@pytest.mark.parametrize("finish_with_last", [True, False])
def test_characters_are_never_shown_in_halves(tokenizer, finish_with_last):
    state = TextState(tokenizer)
    pieces = say(state, tokenizer.encode("é漢🎉"), finish_with_last)
    assert [piece for piece in pieces if piece] == ["é", "漢", "🎉"]
    assert state.text == "é漢🎉"


def test_a_cut_character_becomes_a_replacement(tokenizer):
    state = TextState(tokenizer)
    say(state, tokenizer.encode("a漢")[:3])
    assert state.text == "a\N{REPLACEMENT CHARACTER}"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.eot_id, *tokenizer.encode("b")]
    hidden, shown = TextState(tokenizer), TextState(tokenizer, skip_special=False)
    say(hidden, ids)
    say(shown, ids)
    assert hidden.text == "ab"
    assert shown.text == "a<|eot_id|>b"


@pytest.mark.parametrize("finish_with_last", [True, False])
@pytest.mark.parametrize(
    ("stops", "text", "stopped"),
    [
        ((), "one two three", False),
        (("two",), "one ", True),
        (("three", "two"), "one ", True),
        (("two t", "wo"), "one t", True),
        (("three!",), "one two three", False),
        (("e",), "on", True),
        (("three",), "one two ", True),
        ("two", "one ", True),
    ],
)
def test_stop_texts_end_the_text_and_are_not_shown(
    tokenizer, stops, text, stopped, finish_with_last
):
    state = TextState(tokenizer, stops)
    pieces = say(state, tokenizer.encode("one two three"), finish_with_last)
    assert "".join(pieces) == state.text == text
    assert state.is_stopped == stopped
    if stopped:
        assert state.push(65, True) == ("", True)  # what comes after is ignored


def test_text_that_begins_a_stop_is_held_back_only_as_long():
    stops = StopTexts(["abcd"])
    assert stops.push("xab") == ("x", False)
    assert stops.push("c") == ("", False)
    assert stops.push("abc") == ("abc", False)
    assert stops.push("d.") == ("", True)
    stops = StopTexts(["abcd"])
    assert stops.push("ab") == ("", False)
    assert stops.flush() == "ab"


def test_a_stop_text_may_end_in_the_replacement_of_a_cut_character(tokenizer):
    state = TextState(tokenizer, ["a\N{REPLACEMENT CHARACTER}"])
    say(state, tokenizer.encode("xa漢")[:3])
    assert (state.text, state.is_stopped) == ("x", True)


def test_empty_stop_text_is_refused(tokenizer):
    with pytest.raises(PunaError, match="stop text is empty"):
        StopTexts([""])
    with pytest.raises(PunaError, match="stop text is empty"):
        TextState(tokenizer, ["a", ""])
