"""Which reader a response gets, and the reading of whole JSON bodies."""

from dataclasses import replace
from typing import Protocol

from metered_billing.outcomes.decode import CODINGS, Inflater, Unreadable, read_json
from metered_billing.outcomes.paid import Paid, Said, shown
from metered_billing.outcomes.report import ById, Outcome, by_status, count, is_success, none_kept, tally_for
from metered_billing.outcomes.select import Path, Unfitting, all_succeeded, entries_without_path, entry, listed_in
from metered_billing.outcomes.streams import EVENT_STREAM, LINES, Events, LineReader, Lines


class Reader(Protocol):
    """Reads the outcome off one response, as it is sent."""

    def feed(self, chunk: bytes) -> None:
        """The next bytes of the body, as sent."""

    def finish(self, said: Said, *, complete: bool = True) -> Outcome:
        """What stays paid, now that the response has ended.

        Args:
            said: What the route itself said has failed.
            complete: False where the response broke off.
        """


def reader_for(
    status: int,
    content_type: str | None,
    content_encoding: str | None,
    path: Path | None,
    paid: Paid,
    max_body_bytes: int,
) -> Reader:
    """The reader for a response of this status and these headers.

    A 4xx or 5xx needs none, and a body that is neither JSON nor lines of JSON is counted by its status.

    Args:
        path: As the route gave it; without one the body is looked at for `results` and `items`.
        max_body_bytes: The longest body, compressed or not; of a stream, the longest line.
    """
    if not is_success(status):
        return StatusReader(status, paid)
    media = "application/json"
    if content_type != media:
        media = (content_type or "").partition(";")[0].strip().lower()
    streams = media == EVENT_STREAM or media in LINES
    if not streams and not _is_json(media):
        # A picture at a flat price is no trouble; a picture where a path was given is.
        unreadable = None if path is None else f"its content type is {shown(media)}"
        return StatusReader(status, paid, unreadable)
    coding = (content_encoding or "identity").strip().lower()
    if coding != "identity" and coding not in CODINGS:
        return StatusReader(status, paid, f"its content encoding is {shown(coding)}")
    inflater = None if coding == "identity" else Inflater(coding)
    if streams:
        splitter = Events(max_body_bytes) if media == EVENT_STREAM else Lines(max_body_bytes)
        return LineReader(status, paid, path, splitter, inflater)
    return BodyReader(status, paid, path, max_body_bytes, inflater)


class BodyReader:
    """Reads a whole JSON body, at its end. One that broke off reports nothing: all is refunded."""

    def __init__(
        self,
        status: int,
        paid: Paid,
        path: Path | None,
        max_body_bytes: int,
        inflater: Inflater | None = None,
    ) -> None:
        self._status = status
        self._paid = paid
        self._path = path
        self._max_bytes = max_body_bytes
        self._inflater = inflater
        self._sent_bytes = 0
        self._size = 0
        self._held: list[bytes] = []
        self._unreadable: str | None = None

    def feed(self, chunk: bytes) -> None:
        if self._unreadable is not None:
            return
        try:
            self._sent_bytes += len(chunk)
            if self._sent_bytes > self._max_bytes:
                raise Unreadable(f"more than {self._max_bytes} bytes")
            if self._inflater is None:
                self._held.append(chunk)
            else:
                self._inflate(self._inflater, chunk)
        except Unreadable as error:
            self._unreadable = str(error)
            self._held.clear()

    def finish(self, said: Said, *, complete: bool = True) -> Outcome:
        if not complete:
            return none_kept(self._paid)
        try:
            body = self._body()
            selected = self._path.select(body) if self._path else listed_in(body)
            if all_succeeded(selected, self._paid):
                return by_status(self._status, self._paid, said)
            entries = list(map(entry, selected)) if self._path else entries_without_path(body, self._paid)
        except Unreadable as error:
            return by_status(self._status, self._paid, said, unreadable=str(error))
        except Unfitting as error:
            return replace(by_status(self._status, self._paid, said), mismatch=str(error))
        if entries is None:
            return by_status(self._status, self._paid, said)
        if self._path and not entries:
            return tally_for(self._paid).outcome(said, also=self._path.matched_nothing)
        return count(self._paid, ById(entries), said)

    def _inflate(self, inflater: Inflater, chunk: bytes) -> None:
        for piece in inflater.feed(chunk):
            self._size += len(piece)
            if self._size > self._max_bytes:
                raise Unreadable(f"more than {self._max_bytes} bytes when decompressed")
            self._held.append(piece)

    def _body(self) -> object:
        if self._unreadable is not None:
            raise Unreadable(self._unreadable)
        if self._inflater is not None and not self._inflater.ended:
            raise Unreadable("the compressed body is cut short")
        return read_json(b"".join(self._held))


class StatusReader:
    """Reads nothing: the status code decides. A response that broke off has nothing kept."""

    def __init__(self, status: int, paid: Paid, unreadable: str | None = None) -> None:
        self._status = status
        self._paid = paid
        self._unreadable = unreadable

    def feed(self, chunk: bytes) -> None:
        pass

    def finish(self, said: Said, *, complete: bool = True) -> Outcome:
        if not complete:
            return none_kept(self._paid)
        return by_status(self._status, self._paid, said, unreadable=self._unreadable)


def _is_json(media: str) -> bool:
    """A JSON media type, by RFC 6838's structured suffix too."""
    return media in ("application/json", "text/json") or media.endswith("+json")
