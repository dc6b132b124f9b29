"""Whose turn it is to use a session: one generation at a time, whichever threads they come from."""

from __future__ import annotations

import threading

from .errors import EngineError

# Now and then those who wait look for themselves: a thread may die, and nobody tells.
_LOOK_AGAIN_S = 0.1


class Ticket:
    """One generation's right to its turn.

    Attributes:
        over: Whether it wants no more of it.
    """

    def __init__(self) -> None:
        self.over = False


class Turns:
    """Hands a session from one generation to the next.

    A generation holds its turn until it is over, between its passes too, as the cache is then its own. Another thread
    waits in line until then; the thread that went on with it last begins something else whenever it wants to, and so
    does everybody if that thread has ended.

    Attributes:
        closed: Whether nobody may begin any more.
    """

    def __init__(self) -> None:
        self._changed = (
            threading.Condition()
        )  # entered again by whoever is in it: the garbage collector may end a stream
        self._line: list[Ticket] = []
        self._user: Ticket | None = None
        self._thread: threading.Thread | None = None
        self._working = False
        self.closed = False

    def begin(self, ticket: Ticket, *, wait: bool = True) -> bool:
        """Wait for a turn and begin to work; returns whether it has begun, or else was over before.

        Raises:
            EngineError: It is another thread's turn and nobody wants to wait, or the engine is closed, or this thread
                is at work already.
        """
        with self._changed:
            if self._working and self._thread is threading.current_thread():
                raise EngineError(
                    "a generation cannot begin inside another one of the same engine: processors, strategies and "
                    "drafters that generate need an engine of their own"
                )
            self._line.append(ticket)
            try:
                while not ticket.over and not self._is_free(ticket):
                    if not wait:
                        raise EngineError(
                            "the engine is at work for another thread: wait, or use an engine of your own"
                        )
                    self._changed.wait(_LOOK_AGAIN_S)
                if ticket.over:
                    return False
                self._user, self._thread, self._working = ticket, threading.current_thread(), True
                return True
            finally:
                self._line.remove(ticket)
                self._changed.notify_all()

    def go_on(self, ticket: Ticket) -> None:
        """Work on.

        Raises:
            EngineError: The turn is lost to another generation, or another thread is at work for the same one.
        """
        with self._changed:
            self.check_open()
            if self._user is not ticket:
                raise EngineError("another generation has begun on this engine: this one cannot go on")
            if self._working:
                raise EngineError("another thread is reading this generation at this moment")
            self._thread, self._working = threading.current_thread(), True

    def pause(self, ticket: Ticket) -> None:
        """Stop working, and free the session if that is over."""
        with self._changed:
            if self._user is ticket:
                self._working = False
            self._free(ticket)

    def give_up(self, ticket: Ticket) -> None:
        """Have a generation be over, now or as soon as it pauses; from any thread."""
        with self._changed:
            ticket.over = True
            self._free(ticket)

    def close(self) -> None:
        """Let nobody begin any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def check_open(self) -> None:
        """See that nobody has closed it.

        Raises:
            EngineError: Somebody has.
        """
        if self.closed:
            raise EngineError("the engine is closed: make a new one")

    def _is_free(self, ticket: Ticket) -> bool:
        self.check_open()
        if self._user is None or self._thread is None:
            return self._line[0] is ticket
        if self._working:
            return False
        return self._thread is threading.current_thread() or not self._thread.is_alive()

    def _free(self, ticket: Ticket) -> None:
        if ticket.over and self._user is ticket and not self._working:
            self._user = self._thread = None
        if self._line:
            self._changed.notify_all()
