"""The strings of single tokens, as a reader wants to see them: what is no whole character is shown by its bytes."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how SentencePiece spells a byte
_WORD_START = "▁"  # how SentencePiece spells a space


def token_strings(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Token id -> its string, decoded alone, with its leading space. Of a token that holds part of a character, each
    byte of that part is written out, as in `\\xe2`; an id without a token is written `<50300>`."""
    return {token: _string(tokenizer, token) for token in sorted(set(ids))}


def _string(tokenizer: Any, token: int) -> str:
    spelt = tokenizer.convert_ids_to_tokens(token) if token < len(tokenizer) else None
    if spelt is None:
        return f"<{token}>"
    decoded = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\N{REPLACEMENT CHARACTER}" in decoded:
        return _bytes_of(spelt).decode("utf-8", "backslashreplace")
    if spelt.startswith(_WORD_START) and not decoded.startswith(" "):
        return f" {decoded}"
    return decoded


def _bytes_of(spelt: str) -> bytes:
    """The bytes that the spelling of a byte-level or byte-fallback token stands for."""
    if match := _BYTE_TOKEN.fullmatch(spelt):
        return bytes([int(match[1], 16)])
    alphabet = _byte_alphabet()
    if all(char in alphabet for char in spelt):
        return bytes(alphabet[char] for char in spelt)
    return spelt.encode("utf-8", "surrogatepass")


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in the spelling of byte-level tokens (Radford et al. 2019): the printable bytes of Latin-1
    stand for themselves, the characters from 256 on for the others in turn."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
