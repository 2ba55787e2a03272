"""Token ids to text while they arrive: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from serving.text.tokenizer import TextCodec

_REPLACEMENT = "\ufffd"
# A UTF-8 character has at most 4 bytes: what is still broken after that many tokens stays broken.
_MAX_HELD_TOKENS = 4
# Only broken text makes a long context: a whole character starts a new one.
_MAX_CONTEXT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Shown:
    """What of an answer becomes text, beside the plain of it."""

    stop: bool = False  # the stop string or stop token that ended it
    special_tokens: bool = False
    nothing: bool = False  # the prompt alone was asked for; the one token computed is for nobody


PLAIN_TEXT = Shown()


class Detokenizer:
    """Text of one answer. The pieces joined are the decoded whole.

    A token that reads the same wherever it stands is looked up. Else a short window is decoded: a
    few tokens of context, as a token's text may depend on the one before (a leading space, a
    character in several tokens), and what is new.
    """

    def __init__(self, codec: TextCodec, *, skip_special_tokens: bool = True) -> None:
        self._codec = codec
        self._skips_special = skip_special_tokens
        self._alone = codec.texts_alone(skip_special_tokens=skip_special_tokens)
        self._context: list[int] = []  # emitted already; decoded again to see the difference
        self._held: list[int] = []  # not emitted yet

    def push(self, token_id: int) -> str:
        """Return the text that is certain now."""
        if self._alone.join and not self._held:
            text = self._alone[token_id]
            if _REPLACEMENT not in text:
                self._context = [token_id]
                return text
        self._held.append(token_id)
        return self._emit()

    def finish(self) -> str:
        """Return what was held back, incomplete characters as U+FFFD."""
        text = self._new_text(self._held)
        self._context, self._held = self._context + self._held, []
        return text

    def _emit(self) -> str:
        text = self._new_text(self._held)
        if not text.endswith(_REPLACEMENT):
            self._context, self._held = self._held or self._context, []
            return text
        if len(self._held) <= _MAX_HELD_TOKENS:
            return ""
        # The oldest token stays broken; the others may be a character that has only begun.
        oldest = self._held.pop(0)
        text = self._new_text([oldest])
        self._context = [*self._context[-_MAX_CONTEXT_TOKENS:], oldest]
        return text + self._emit()

    def _new_text(self, token_ids: list[int]) -> str:
        context = self._context
        if not context:
            before = ""
        elif len(context) == 1:
            before = self._alone[context[0]]
        else:
            before = self._codec.decode(context, skip_special_tokens=self._skips_special)
        after = self._codec.decode(context + token_ids, skip_special_tokens=self._skips_special)
        return after[len(before) :]


class StopFilter:
    """Cuts text at the first stop string, and holds back what may become one."""

    def __init__(self, stops: Sequence[str], *, shows_stop: bool = False) -> None:
        self.stops = tuple(stops)
        self._shows_stop = shows_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Return what may be shown. After a match nothing more is."""
        if self.matched is not None:
            return ""
        if not self.stops:
            return text
        self._held += text
        found = [(at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.matched = min(found)
            end = at + len(self.matched) if self._shows_stop else at
            shown, self._held = self._held[:end], ""
            return shown
        keep = max(self._overlap(stop) for stop in self.stops)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return what was held back in vain."""
        shown, self._held = self._held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """Length of the longest end of the held text that begins `stop`."""
        longest = min(len(stop) - 1, len(self._held))
        return next(n for n in range(longest, -1, -1) if self._held.endswith(stop[:n]))
