"""NDJSON and server-sent events, read line by line as they pass; no more than one line is held.

A line (or event) that is not JSON, such as a comment, a text or `[DONE]`, is passed over, and so is one that
reports nothing. What stands after the last line end counts only if the stream was completed: of a stream
that broke off, nobody knows how the line would have gone on.
"""

from typing import Protocol

from metered_billing.outcomes.decode import Inflater, NotJson, Unreadable, read_json
from metered_billing.outcomes.paid import Paid, Said
from metered_billing.outcomes.report import Outcome, by_status, tally_for
from metered_billing.outcomes.select import Path, entries_of_line

EVENT_STREAM = "text/event-stream"

LINES = frozenset(
    {
        "application/x-ndjson",
        "application/ndjson",
        "application/jsonl",
        "application/jsonlines",
        "application/x-jsonlines",
    }
)

_BOMB = 1 << 23
"""The most bytes that one chunk may inflate to: twice what zlib itself holds back of a repetitive stream
before it writes a chunk (16,384 symbols of up to 258 bytes)."""

_STARTS = frozenset(b'{["-0123456789tfn \t\r\xef')
"""How JSON can start, white space and a byte order mark included. Trying is dear where it fails."""


class LineReader:
    """Reads the outcome off a stream of lines or events.

    Args:
        status: Of the response; decides where nothing is reported and no path was given.
        path: Applied to each line; without one, an object with a `status` reports on itself.
        splitter: `Lines` or `Events`.
    """

    def __init__(
        self,
        status: int,
        paid: Paid,
        path: Path | None,
        splitter: "Splitter",
        inflater: Inflater | None = None,
    ) -> None:
        self._status = status
        self._paid = paid
        self._path = path
        self._entries = path or entries_of_line
        self._splitter = splitter
        self._inflater = inflater
        self._tally = tally_for(paid)
        self._unreadable: str | None = None
        self._gave_up = False

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body, as sent."""
        if self._inflater is None:
            self._read(self._splitter.feed(chunk))
        elif not self._gave_up:
            self._inflate(self._inflater, chunk)

    def finish(self, said: Said, *, complete: bool = True) -> Outcome:
        """What stays paid, now that the stream has ended.

        Args:
            complete: False where it broke off. Then what it had reported as succeeded stays paid, no more.
        """
        if not complete:
            return self._tally.outcome(said, early=True, unreadable=self._unreadable)
        if self._inflater is None or (self._inflater.ended and not self._gave_up):
            self._read(self._splitter.end())
        elif not self._gave_up:
            self._unreadable = "the compressed stream is cut short"
        if self._unreadable is not None:
            return self._tally.outcome(said, unreadable=self._unreadable)
        if self._tally.reported:
            return self._tally.outcome(said)
        if self._path is None:
            return by_status(self._status, self._paid, said)
        return self._tally.outcome(said, also=self._path.matched_nothing)

    def _inflate(self, inflater: Inflater, chunk: bytes) -> None:
        size = 0
        try:
            for piece in inflater.feed(chunk):
                size += len(piece)
                if size > _BOMB:
                    raise Unreadable(f"one chunk inflates to more than {_BOMB} bytes")
                self._read(self._splitter.feed(piece))
        except Unreadable as error:
            self._unreadable = str(error)
            self._gave_up = True

    def _read(self, lines: list[bytes | None]) -> None:
        for line in lines:
            if line is None:
                self._unreadable = f"a line of more than {self._splitter.max_bytes} bytes"
                continue
            if not line or line[0] not in _STARTS:
                continue
            try:
                for item, ok in self._entries(read_json(line)):
                    self._tally.add(item, ok)
            except NotJson:
                continue
            except Unreadable as error:
                self._unreadable = str(error)


class Splitter(Protocol):
    """Cuts a stream up. Of a line or event that is too long there is None in place of its bytes."""

    max_bytes: int

    def feed(self, chunk: bytes) -> list[bytes | None]:
        """What the chunk completes."""

    def end(self) -> list[bytes | None]:
        """What the end of the stream completes."""


class Lines:
    """Lines, ended by LF. A CR before it is white space to JSON."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._held = bytearray()
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes | None]:
        first, *more = chunk.split(b"\n")
        self._hold(first)
        if not more:
            return []
        lines = [self._take()]
        lines += [line if len(line) <= self.max_bytes else None for line in more[:-1]]
        self._hold(more[-1])
        return lines

    def end(self) -> list[bytes | None]:
        return [self._take()] if self._size else []

    def _hold(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self.max_bytes:
            self._held += part
        else:
            self._held.clear()

    def _take(self) -> bytes | None:
        line = bytes(self._held) if self._size <= self.max_bytes else None
        self._held.clear()
        self._size = 0
        return line


class Events:
    """The data of server-sent events, by https://html.spec.whatwg.org/multipage/server-sent-events.html.

    One thing is done otherwise: the standard drops an event whose empty line never came, and `end` takes it.
    It is only asked for it where the stream was completed, and then the server did send the event.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lines = Lines(max_bytes)
        self._after_cr = False
        self._started = False
        self._data: list[bytes] = []
        self._size = 0

    def feed(self, chunk: bytes) -> list[bytes | None]:
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            # The second half of a CRLF: the CR has ended the line already.
            chunk = chunk[1:]
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        else:
            self._after_cr = False
        return self._events(self._lines.feed(chunk))

    def end(self) -> list[bytes | None]:
        return self._events([*self._lines.end(), b""])

    def _events(self, lines: list[bytes | None]) -> list[bytes | None]:
        events: list[bytes | None] = []
        for line in lines:
            if not self._started:
                self._started = True
                line = line and line.removeprefix(b"\xef\xbb\xbf")
            if line is None:
                # It may have been data of this event, so that the event is no longer whole.
                self._size = self.max_bytes + 1
            elif line.startswith(b"data:"):
                self._add(line[5:].removeprefix(b" "))
            elif not line and self._size:
                events.append(b"\n".join(self._data) if self._size <= self.max_bytes else None)
                self._data = []
                self._size = 0
        return events

    def _add(self, data: bytes) -> None:
        self._size += len(data) + 1
        if self._size <= self.max_bytes:
            self._data.append(data)
        else:
            self._data.clear()
