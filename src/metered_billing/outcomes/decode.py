"""Bytes to JSON values: gzip and deflate undone, then the text parsed.

Nothing here holds more of a body, compressed or not, than was asked for.
"""

import json
import zlib
from collections.abc import Iterator

CODINGS = frozenset({"gzip", "x-gzip", "deflate"})

_STEP = 1 << 14
"""Bytes taken at a time. Short, for zlib copies what is left of them at the end of each gzip member."""

_PIECE = 1 << 16
"""The most that is inflated at a time, in bytes."""

_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class Unreadable(Exception):
    """A body, or a part of it, that nothing can be said about. `args[0]` is why, for a person to read."""


class NotJson(Unreadable):
    """Text that is not JSON at all."""


def read_json(text: bytes) -> object:
    """The JSON value, in UTF-8, UTF-16 or UTF-32.

    Raises:
        NotJson: It is none.
        Unreadable: It may be one, but is beyond Python: too deep, or with an int of too many digits.
    """
    try:
        return _read_utf8(text)
    except (ValueError, RecursionError):
        pass  # in another encoding, or as wrong as it looks
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJson(f"not JSON: {error.msg} at character {error.pos}") from error
    except UnicodeDecodeError as error:
        raise NotJson(f"not JSON: {error.reason} at byte {error.start}") from error
    except (RecursionError, ValueError) as error:
        raise Unreadable(f"JSON beyond us: {type(error).__name__}") from error


def _read_utf8(text: bytes) -> object:
    """The JSON value, as it nearly always comes: sooner than by `json.loads`, which finds out the encoding first."""
    plain = text.decode().strip(" \t\n\r")
    value, end = _DECODER.raw_decode(plain)
    if end < len(plain):
        raise ValueError("more than one value")
    return value


_DECODER = json.JSONDecoder()


class Inflater:
    """Undoes one content coding of `CODINGS`."""

    __slots__ = ("_gzip", "_head", "_zlib")

    def __init__(self, coding: str) -> None:
        self._gzip = coding != "deflate"
        self._zlib = zlib.decompressobj(_GZIP) if self._gzip else None
        self._head = b""

    @property
    def ended(self) -> bool:
        """Whether what came so far is whole."""
        return self._zlib is not None and self._zlib.eof

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The next bytes in, what they hold out, in pieces of at most 64 KiB: stop asking when it is enough.

        Raises:
            Unreadable: This is not the coding that it was said to be.
        """
        try:
            for start in range(0, len(chunk), _STEP):
                yield from self._feed(chunk[start : start + _STEP])
        except zlib.error as error:
            raise Unreadable(f"broken {'gzip' if self._gzip else 'deflate'}") from error

    def _feed(self, data: bytes) -> Iterator[bytes]:
        if self._zlib is None:
            data = self._head + data
            if len(data) < 2:
                self._head = data
                return
            self._zlib = zlib.decompressobj(_ZLIB if _has_zlib_header(data) else _RAW)
        while True:
            if self._zlib.eof:
                # RFC 1952, 2.2: gzip members may follow each other. Padding with zeros is common.
                data = data.lstrip(b"\0")
                if not data:
                    return
                self._zlib = zlib.decompressobj(_GZIP if self._gzip else _ZLIB)
            piece = self._zlib.decompress(data, _PIECE)
            if piece:
                yield piece
            data = self._zlib.unused_data if self._zlib.eof else self._zlib.unconsumed_tail
            # Even without input left there may be output left, where a piece came out full.
            if not data and len(piece) < _PIECE:
                return


def _has_zlib_header(data: bytes) -> bool:
    """Whether this is deflate as HTTP means it (RFC 1950), or bare, as some servers send it."""
    return data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0
