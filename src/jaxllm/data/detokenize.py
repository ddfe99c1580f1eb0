"""What tokens spell: their bytes, and streams of ids as text that never holds half a character."""

import codecs
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def byte_level_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable Latin-1 characters are themselves, the others follow from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def is_byte_level(tokenizer: dict[str, Any]) -> bool:
    """Whether a parsed `tokenizer.json` decodes its tokens as GPT-2's byte spelling."""
    decoder = tokenizer.get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


def token_to_bytes(token: str | None, characters: dict[str, int] | None) -> bytes:
    """The bytes that a token stands for.

    Args:
        token: the vocabulary's spelling; None: an id that is not used, which stands for nothing.
        characters: `byte_level_characters()` in a byte-level vocabulary; None: SentencePiece's spelling ("▁" is a space,
            "<0x0A>" a byte) and WordPiece's ("##" continues a word).
    """
    if token is None:
        return b""
    if characters is not None:
        # Added tokens may hold characters outside the spelling: these stand for themselves.
        inside = all(character in characters for character in token)
        return bytes(characters[character] for character in token) if inside else token.encode()
    byte = _BYTE_FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.removeprefix("##").replace("▁", " ").encode()


class StreamDecoder:
    """Text of ids that come one at a time; joined, the pieces equal the decoded whole.

    A piece never ends inside a character: its bytes are held back until the character is whole, or is known to be broken
    (then it is U+FFFD, as in the whole).
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        table: list[bytes] | None,
        skipped: frozenset[int] = frozenset(),
    ):
        """Starts a stream; `Tokenizer.stream` is the convenient way.

        Args:
            decode: text of a list of ids.
            table: bytes of each id, in a byte-level vocabulary; None: work with `decode` alone.
            skipped: ids that give no text (only used with `table`).
        """
        self._decode, self._table, self._skipped = decode, table, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Without a table: ids from the last emitted piece on, of which the first `_told` are already text. The piece is
        # kept because decoders treat the first token of a text differently.
        self._ids: list[int] = []
        self._told = 0

    def push(self, token: int) -> str:
        """The text that became certain with this id; often empty."""
        if self._table is not None:
            return "" if token in self._skipped else self._utf8.decode(self._table[token])
        self._ids.append(token)
        before, after = self._decode(self._ids[: self._told]), self._decode(self._ids)
        if len(after) <= len(before) or after.endswith("\ufffd"):
            return ""
        self._ids, self._told = self._ids[self._told :], len(self._ids) - self._told
        return after[len(before) :]

    def flush(self) -> str:
        """What was held back, at the end of the stream; the decoder can then be used for another one."""
        if self._table is not None:
            return self._utf8.decode(b"", final=True)
        text = self._decode(self._ids)[len(self._decode(self._ids[: self._told])) :]
        self._ids, self._told = [], 0
        return text
