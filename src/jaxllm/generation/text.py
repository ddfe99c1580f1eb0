"""Token ids to text as they come, with stop strings found across token boundaries."""

from typing import Any


class TextStream:
    """Text of one request; stop strings never show, and neither does anything after one.

    Attributes:
        text: all text released so far.
        stopped: a stop string was found; nothing more is released.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        """``tokenizer`` is a :class:`jaxllm.data.tokenizer.Tokenizer`; ``stop`` holds non-empty strings."""
        self._decoder = tokenizer.stream()
        self._stop = stop
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain after ``token``: what could still begin a stop string is held back."""
        return self._release(self._decoder.push(token))

    def flush(self) -> str:
        """What was held back, at the end of the request."""
        piece = self._release(self._decoder.flush())
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    @property
    def received(self) -> int:
        """Characters of all tokens so far, those held back included, up to a stop string."""
        return len(self.text) + len(self._held)

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [place for place in (held.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped = True
            piece, self._held = held[: min(found)], ""
        else:
            keep = max((_overlap(held, stop) for stop in self._stop), default=0)
            piece, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a proper beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
