"""One thread that decodes for everyone who asks: requests join the running batch between its steps.

Each gets what it would get alone, but for rounding (`generate/engine.py`). A model that only Transformers can decode
answers one request after the other.
"""

import queue
import sys
import threading
from collections.abc import Iterator
from itertools import count

from medlora.errors import MedloraError, ModelError
from medlora.generate.answer import Asked, Assistant
from medlora.generate.engine import Engine
from medlora.generate.request import Row, Token

MOST = 64  # requests that wait or run


class Busy(Exception):
    """So many requests are under way that one more would wait too long."""


class Ticket:
    """A request under way."""

    def __init__(self, index: int, asked: Asked, row: Row | None) -> None:
        self.index, self.asked, self.row = index, asked, row
        self.left = False
        """Whether nobody waits for it any more."""
        self.landed: queue.SimpleQueue[tuple[Token, str] | Exception] = queue.SimpleQueue()

    def leave(self) -> None:
        """Nobody wants the rest."""
        self.left = True
        if self.row:
            self.row.done = True

    def __iter__(self) -> Iterator[tuple[Token, str]]:
        """Its tokens, as they come, each with the text that became certain. Raises what went wrong."""
        while True:
            landed = self.landed.get()
            if isinstance(landed, Exception):
                raise landed
            yield landed
            if landed[0].last:
                return


class Worker(threading.Thread):
    """Decodes until `stop`.

    Args:
        assistant: nobody else may use it meanwhile.
        most: requests that wait or run.
    """

    def __init__(self, assistant: Assistant, most: int = MOST) -> None:
        super().__init__(name="decoder", daemon=True)
        self.assistant, self.most = assistant, most
        self.engine = assistant.engine if isinstance(assistant.engine, Engine) else None
        self._index = count()
        self._came: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._tickets: dict[int, Ticket] = {}
        self._lock = threading.Lock()
        self._stopped = False

    def ask(self, asked: Asked) -> Ticket:
        """Have a request decoded.

        Raises:
            Busy: too many are under way. ModelError: as `Engine.stream`, or it has stopped.
        """
        with self._lock:
            if self._stopped:
                raise ModelError("the server stops")
            if len(self._tickets) >= self.most:
                raise Busy(f"{self.most} requests are under way; ask again later")
            index = next(self._index)
            ticket = Ticket(index, asked, self.engine.row(index, asked.request) if self.engine else None)
            self._tickets[index] = ticket
        self._came.put(ticket)
        return ticket

    def stop(self) -> None:
        """End the thread within a step; what is under way ends with an error."""
        with self._lock:  # whoever asks later hears so
            self._stopped = True
        self._came.put(None)
        self.join()

    def run(self) -> None:
        while not self._stopped:
            try:
                for token in self.engine.serve(self._arrivals) if self.engine else self._in_turn():
                    self._deliver(token)
            except Exception as error:  # the others' answers are lost with it, the next ones need not be
                sys.stderr.write(f"decoding failed: {type(error).__name__}\n")
                self._fail(error if isinstance(error, MedloraError) else ModelError("decoding failed; ask again"))
        self._fail(ModelError("the server stops"))

    def _arrivals(self, idle: bool) -> list[Row]:
        self._forget()
        came = [ticket.row for ticket in self._waiting(idle) if ticket.row]
        if self._stopped:
            self._fail(ModelError("the server stops"))
        return came

    def _waiting(self, idle: bool) -> list[Ticket]:
        """What came; where there is nothing else to do, once something has."""
        came: list[Ticket] = []
        while True:
            try:
                ticket = self._came.get(block=idle and not came and not self._stopped)
            except queue.Empty:
                return came
            if ticket is None:
                return []
            if ticket.index in self._tickets:
                came.append(ticket)

    def _in_turn(self) -> Iterator[Token]:
        for ticket in self._waiting(idle=True):
            for token in self.assistant.tokens([ticket.asked]):
                if ticket.left or self._stopped:
                    break
                yield Token(ticket.index, token.id, token.last, token.ended, token.logprob, token.top)
            self._forget()

    def _deliver(self, token: Token) -> None:
        ticket = self._tickets.get(token.request)
        if ticket:
            ticket.landed.put((token, ticket.asked.text.piece(last=token.last)))
            if token.last:
                self._end([ticket])

    def _forget(self) -> None:
        self._end([ticket for ticket in list(self._tickets.values()) if ticket.left])

    def _fail(self, error: Exception) -> None:
        under_way = list(self._tickets.values())
        for ticket in under_way:
            ticket.landed.put(error)
            ticket.leave()
        self._end(under_way)

    def _end(self, tickets: list[Ticket]) -> None:
        with self._lock:
            for ticket in tickets:
                self._tickets.pop(ticket.index, None)
