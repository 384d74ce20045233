"""Strings of single tokens: no token becomes garbage because it was decoded alone."""

from __future__ import annotations

from typing import Any

from dictionary_learning.analysis.vocabulary import token_strings


class SentencePiece:
    """As such tokenizers behave: a leading space is lost when a token is decoded alone, bytes are spelt."""

    PIECES = ("▁hip", "bone", "<0xE2>", "<0x0A>", "▁")

    def __len__(self) -> int:
        return len(self.PIECES)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.PIECES[token]

    def decode(self, ids: list[int], **options: Any) -> str:
        return ["hip", "bone", "\N{REPLACEMENT CHARACTER}", "\n", ""][ids[0]]


def test_parts_of_characters_are_shown_by_their_bytes(tokenizer: Any) -> None:
    ids = tokenizer("é a😀")["input_ids"]  # one token a byte
    strings = token_strings(tokenizer, [*ids, 256])
    assert [strings[token] for token in ids] == ["\\xc3", "\\xa9", " ", "a", "\\xf0", "\\x9f", "\\x98", "\\x80"]
    assert strings[256] == "<|endoftext|>"


def test_every_byte_of_a_byte_level_tokenizer_is_told(tokenizer: Any) -> None:
    strings = token_strings(tokenizer, range(256))
    spelt = {tokenizer.convert_ids_to_tokens(token): string for token, string in strings.items()}
    assert len(set(strings.values())) == 256
    assert spelt["Ġ"] == " " and spelt["Ċ"] == "\n" and spelt["a"] == "a" and spelt["Ł"] == "\\x9f"
    assert sorted(string for string in strings.values() if "\\x" in string) == [f"\\x{b:02x}" for b in range(128, 256)]


def test_a_replacement_character_of_the_text_stays_one() -> None:
    class Spelt(SentencePiece):
        PIECES = ("\N{REPLACEMENT CHARACTER}",)

        def decode(self, ids: list[int], **options: Any) -> str:
            return "\N{REPLACEMENT CHARACTER}"

    assert token_strings(Spelt(), [0]) == {0: "\N{REPLACEMENT CHARACTER}"}


def test_leading_spaces_are_kept_and_absent_tokens_numbered() -> None:
    assert token_strings(SentencePiece(), [4, 0, 1, 2, 3, 0, 9]) == {
        0: " hip",
        1: "bone",
        2: "\\xe2",
        3: "\n",
        4: " ",
        9: "<9>",
    }
