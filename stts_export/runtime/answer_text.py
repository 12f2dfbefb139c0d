"""The text of an answer while its tokens come: in pieces, and ended by stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stts_export.errors import InputError

OnText = Callable[[str], None]
Decode = Callable[[Sequence[int]], str]

_INCOMPLETE = "\ufffd"
"""What the first tokens of a character that takes several decode to."""


class AnswerText:
    """Decodes an answer as it grows.

    All tokens are decoded each time, because what a token adds may depend on those before it. The
    `DecodeStream` of tokenizers never gives a text that ends within a character, so its pieces
    would not make up the whole.

    Args:
        decode: token ids to text.
        stop: texts that end the answer, none of them empty.
        on_text: called with every piece as soon as it is final; the pieces make up `text`.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), on_text: OnText | None = None
    ) -> None:
        self.text = ""
        """What is final; the answer after `finish`."""
        self._decode = decode
        self._stop = stop
        self._on_text = on_text

    def ends(self, token_ids: Sequence[int]) -> bool:
        """Take the tokens so far; return whether their text has a stop string, which ends it."""
        if not self._stop and self._on_text is None:
            return False
        return self._take(self._decode(token_ids).rstrip(_INCOMPLETE), is_whole=False)

    def finish(self, token_ids: Sequence[int]) -> bool:
        """Take all tokens, where `ends` did not end the text; return whether a stop string does.

        Raises:
            InputError: the tokenizer changed text that was given out as final.
        """
        return self._take(self._decode(token_ids), is_whole=True)

    def _take(self, text: str, is_whole: bool) -> bool:
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            text = text[: min(places)]
        elif not is_whole:
            text = text[: len(text) - self._held_back(text)]
        if self._on_text and not text.startswith(self.text):
            if is_whole:
                raise InputError(
                    "the tokenizer's decoder changes text after the fact, as of "
                    f"{self.text!r:.80} to {text!r:.80}",
                    where="on_text",
                    fix="leave on_text out (--stream of `run`): the answer comes at its end",
                )
            return False
        piece = text[len(self.text) :]
        self.text = text
        if piece and self._on_text:
            self._on_text(piece)
        return bool(places)

    def _held_back(self, text: str) -> int:
        """Characters at the end that may become a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if text.endswith(stop[:length])
            ),
            default=0,
        )


def check_stop(stop: object) -> tuple[str, ...]:
    """Return stop strings, given as one or several.

    Raises:
        InputError: one is empty, or is not a string.
    """
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, (list, tuple)) or not all(
        isinstance(text, str) and text for text in stops
    ):
        raise InputError(
            f"stop is {stop!r}", where="stop", allowed="a string or several, none of them empty"
        )
    return tuple(stops)
