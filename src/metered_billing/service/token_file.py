"""A file of tokens: read anew when it has changed, so that a rotation needs no restart; and changed as a whole."""

import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from metered_billing.service.tokens import InvalidTokens, Token, Tokens, text_of

LOOK_AGAIN_S = 1.0
"""How often it is looked whether the file has changed, at the most."""

_SETTLED_S = 2.0
"""Younger files may change once more without looking changed: their times are not fine enough."""

_WRITTEN_S = 1.0
"""Younger files may be half written: they count when they are older, or are the same at the next look."""

_log = logging.getLogger("metered_billing.service")

_Signature = tuple[int, int, int]


class TokenFile:
    """The tokens that stand in a file now, or what stood there last that could be read.

    Args:
        monotonic: Says when to look again, in seconds.

    Raises:
        InvalidTokens: It cannot be read, or has no token.
    """

    def __init__(
        self,
        file: Path,
        *,
        look_again_s: float = LOOK_AGAIN_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._look_again_s = look_again_s
        self._monotonic = monotonic
        self._signature = _signature(file)
        self._next_look = monotonic() + look_again_s
        self._complaint = ""
        self._seen: str | None = None
        self._number = _number_of(file)
        self._tokens = Tokens.load(file)
        self._warn()

    def __len__(self) -> int:
        return len(self._tokens)

    def find(self, secret: str) -> Token | None:
        """As `Tokens.find`, of the file as it is now or was two seconds ago."""
        now = self._monotonic()
        if now >= self._next_look:
            self._next_look = now + self._look_again_s
            self._look()
        return self._tokens.find(secret)

    def _look(self) -> None:
        signature = _signature(self._file)
        if signature is not None and signature == self._signature:
            return
        # Before it is read: what changes meanwhile is read once more.
        self._signature = signature
        try:
            text = text_of(self._file)
            if self._may_be_half_written(text):
                self._signature = None
                return
            tokens = Tokens.of_lines(text)
        except InvalidTokens as error:
            # To lock everybody out for a slip of the pen would be worse than a token that lives on. It is read again
            # each time, for a file that is only made readable does not look changed.
            self._signature = None
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.error("the tokens are those that were read last: %s", error)
            return
        self._complaint = ""
        known, new = {token.id for token in self._tokens}, {token.id for token in tokens}
        if list(tokens) != list(self._tokens):
            self._tokens = tokens
            _log.warning(
                "tokens read anew from %s: %d now; added: %s; removed: %s",
                self._file,
                len(tokens),
                ", ".join(sorted(new - known)) or "none",
                ", ".join(sorted(known - new)) or "none",
            )
            self._warn()

    def _may_be_half_written(self, text: str) -> bool:
        """Whether to wait for the next look. Half a file has no token, too few, or one of a wider scope.

        Another file in its place (`mv`) is whole, unless nothing is in it. What has grown old unseen counts at once: a
        token must not live on because nobody used it meanwhile.
        """
        seen, self._seen = self._seen, text
        before, self._number = self._number, _number_of(self._file)
        if text == seen or not _is_young(self._file):
            return False
        try:
            lets_in = len(Tokens.of_lines(text)) > 0
        except InvalidTokens:
            lets_in = False
        if not lets_in:
            _log.warning(
                "the tokens file %s is empty or half written; the tokens stay as they were, unless it is without any"
                " when it is looked at next",
                self._file,
            )
        return self._number == before or not lets_in

    def _warn(self) -> None:
        if not any(token.plain for token in self._tokens):
            return
        try:
            exposed = self._file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
        except OSError:
            return
        if exposed:
            _log.warning(
                "others on this machine can read the secrets in %s: chmod 600 it, or have digests there "
                "(metered-billing token new)",
                self._file,
            )


def open_tokens(file: Path | None, environ: Mapping[str, str] = os.environ) -> Tokens | TokenFile:
    """From the file if one is named, else from the environment.

    Raises:
        InvalidTokens: There is none, or they cannot be read.
    """
    return Tokens.load(None, environ) if file is None else TokenFile(file)


def add_line(file: Path, line: str) -> None:
    """Put a token's line at the end of a file, which is made where there is none, for its owner alone.

    Raises:
        InvalidTokens: What stands there cannot be read, or it cannot be written.
    """
    with _changing(file) as lines:
        lines.append(line)


def remove_token(file: Path, token_id: str) -> Token:
    """Take a token's line out of a file. Comments stay.

    Raises:
        InvalidTokens: There is no such token, or the file cannot be read or written.
    """
    if not file.exists():
        raise InvalidTokens(f"the tokens file {file} cannot be read: No such file or directory")
    with _changing(file) as lines:
        for number, line in enumerate(lines):
            for token in Tokens.of_lines(line):
                if token.id == token_id:
                    del lines[number]
                    return token
        raise InvalidTokens(f"there is no token {token_id!r} in {file}")


@contextmanager
def _changing(file: Path) -> Iterator[list[str]]:
    """The lines of a file, to be changed: whoever reads it sees all of the change or nothing of it."""
    file = file.resolve()
    try:
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            # Two that change it at once would lose one's change.
            fcntl.flock(directory, fcntl.LOCK_EX)
            text = text_of(file) if file.exists() else ""
            Tokens.of_lines(text)
            lines = text.splitlines()
            yield lines
            _replace(file, "".join(f"{line}\n" for line in lines))
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise InvalidTokens(f"the tokens file {file} cannot be written: {error.strerror}") from None


def _replace(file: Path, text: str) -> None:
    number, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)  # for its owner alone
    try:
        with os.fdopen(number, "w", encoding="utf-8") as new:
            new.write(text)
            new.flush()
            os.fsync(number)
            if file.exists():
                # The service that reads it may be another user's than whoever changes it.
                before = file.stat()
                os.fchmod(number, stat.S_IMODE(before.st_mode))
                if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(number, before.st_uid, before.st_gid)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _number_of(file: Path) -> int:
    """Its inode: what is put in its place has another."""
    try:
        return file.stat().st_ino
    except OSError:
        return 0


def _is_young(file: Path) -> bool:
    """Whether it was changed a moment ago; not where its time is none that can be."""
    try:
        return 0 <= time.time() - file.stat().st_mtime < _WRITTEN_S
    except OSError:
        return False


def _signature(file: Path) -> _Signature | None:
    """What changes with the file; None where that cannot be told yet."""
    try:
        found = file.stat()
    except OSError:
        return None
    if stat.S_ISFIFO(found.st_mode):
        return 0, 0, 0  # a pipe can be read only once
    if time.time() - found.st_mtime < _SETTLED_S:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
