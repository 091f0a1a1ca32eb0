"""From tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from medlora.data.prompts import Tokenizer

UNFINISHED = "\ufffd"  # how a tokenizer writes part of a UTF-8 sequence
CONTEXT = 8  # tokens decoded again for each new one: a tokenizer may join it with what stands before


class Text:
    """The text of one growing answer."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.ids: list[int] = []
        self.whole = ""
        """Every character that is certain."""
        self._read = 0
        self._given = 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        start = max(self._read - CONTEXT, 0)
        before = self._decode(self.ids[start : self._read])
        now = self._decode(self.ids[start:])
        if not now.endswith(UNFINISHED):
            self.whole += now[len(before) :]
            self._read = len(self.ids)

    def ends_with(self, ids: Sequence[int]) -> bool:
        """Take the last token of `ids`; whether a stop string is there, before which the text then ends."""
        self.add(ids[-1])
        places = [place for place in (self.whole.find(text) for text in self.stop) if place >= 0]
        if places:
            self.whole = self.whole[: min(places)]
        return bool(places)

    def piece(self, *, last: bool) -> str:
        """What was not given yet; until the last, without what may become a stop string."""
        end = len(self.whole) if last else len(self.whole) - self._pending()
        piece = self.whole[self._given : end]
        self._given = max(self._given, end)
        return piece

    def final(self) -> str:
        """The whole answer, without space around it."""
        return self.whole.strip()

    def _pending(self) -> int:
        """Characters at the end that begin a stop string."""
        return max((n for text in self.stop for n in range(1, len(text)) if self.whole.endswith(text[:n])), default=0)

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text
