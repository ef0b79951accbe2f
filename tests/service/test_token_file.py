"""A file of tokens that changes while the service runs."""

import logging
import os
import threading
from pathlib import Path

import pytest

from metered_billing.service import InvalidTokens, TokenFile, Tokens, open_tokens, token_file
from metered_billing.service.token_file import add_line, remove_token
from metered_billing.service.tokens import new_token, text_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "tokens"
    file.write_text("# the app's\nold *\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tokens(file: Path, clock: Clock) -> TokenFile:
    return TokenFile(file, monotonic=clock)


def known(tokens: TokenFile, *secrets: str) -> list[bool]:
    return [tokens.find(secret) is not None for secret in secrets]


def put(file: Path, text: str) -> None:
    """Another file in its place."""
    other = file.with_name("other")
    other.write_text(text)
    other.chmod(0o600)
    other.replace(file)


def tells(record: logging.LogRecord) -> bool:
    return "tokens" in record.getMessage() and "chmod" not in record.getMessage()


def aged(file: Path) -> None:
    """As if it had been written a while ago, so that its times can be told apart."""
    past = file.stat().st_mtime - 60
    os.utime(file, (past, past))


def test_token_that_is_added_gets_in_and_one_that_is_removed_does_not(
    file: Path, tokens: TokenFile, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Within a second, or two where it was written in place; and the log says which, by their ids."""
    assert known(tokens, "old", "new") == [True, False]
    file.write_text("old *\nnew *\n")
    assert known(tokens, "old", "new") == [True, False]
    clock.now = 1.0
    assert known(tokens, "old", "new") == [True, False]
    clock.now = 2.0
    assert known(tokens, "old", "new") == [True, True]
    put(file, "new *\n")
    clock.now = 3.0
    with caplog.at_level(logging.WARNING):
        assert known(tokens, "old", "new") == [False, True]
    old = next(iter(Tokens({"old": "*"})))
    assert f"removed: {old.id}" in caplog.text
    assert "old" not in caplog.text.replace(str(file), "")


def test_file_is_read_again_only_when_it_has_changed(file: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a look at its times is all; a young file, whose times may not tell, is read once more."""
    aged(file)
    tokens = TokenFile(file, monotonic=clock)
    reads: list[Path] = []
    read = text_of
    monkeypatch.setattr(token_file, "text_of", lambda path: reads.append(path) or read(path))  # type: ignore[func-returns-value]
    for clock.now in (0.5, 1.0, 1.5, 2.0, 3.0):
        assert known(tokens, "old") == [True]
    assert reads == []
    put(file, "new *\n")
    for clock.now in (4.0, 5.0):
        assert known(tokens, "new") == [True]
    assert len(reads) == 2
    aged(file)
    for clock.now in (6.0, 7.0, 8.0):
        assert known(tokens, "new") == [True]
    assert len(reads) == 3


@pytest.mark.parametrize("broken", ["hush\n", "hush everything\n", "hush *\nhush admin\n", None])
def test_file_that_cannot_be_read_changes_nothing(
    file: Path, tokens: TokenFile, clock: Clock, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    """A slip of the pen locks nobody out: said once, as an error, and without a secret; mended, it counts."""
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    for clock.now in (1.0, 2.0, 3.0):
        assert known(tokens, "old", "hush") == [True, False]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "read last" in record.getMessage()
    assert "hush" not in record.getMessage()
    put(file, "new *\n")
    for clock.now in (4.0, 5.0):  # a file that was made anew may have the inode of the one that was there
        known(tokens, "new")
    assert known(tokens, "old", "new") == [False, True]


def test_pipe_is_read_once(clock: Clock) -> None:
    """`--tokens-file <(…)`: a second look would find nothing in it, and lock everybody out."""
    reading, writing = os.pipe()
    try:
        os.write(writing, b"piped *\n")
        os.close(writing)
        tokens = TokenFile(Path(f"/dev/fd/{reading}"), monotonic=clock)
        for clock.now in (1.0, 2.0, 3.0):
            assert known(tokens, "piped") == [True]
    finally:
        os.close(reading)


def test_file_of_no_tokens_lets_nobody_in(file: Path, tokens: TokenFile, clock: Clock) -> None:
    """Revoking the last token revokes it. To start with none is refused."""
    file.write_text("# none\n")
    for clock.now in (1.0, 2.0):
        known(tokens, "old")
    assert known(tokens, "old") == [False]
    assert len(tokens) == 0
    with pytest.raises(InvalidTokens):
        TokenFile(file)


@pytest.mark.parametrize("half", ["", "# the app's\n", "old *\nne", "old *\nread", "ne"])
def test_file_that_is_being_written_changes_nothing_yet(
    file: Path, tokens: TokenFile, clock: Clock, caplog: pytest.LogCaptureFixture, half: str
) -> None:
    """`cat > tokens` empties it first. Half of it may be no token, or one that may do more than it should."""
    file.write_text(half)
    clock.now = 1.0
    assert known(tokens, "old", "ne", "read") == [True, False, False]
    file.write_text("old *\nnew read:tenant:acme\n")
    for clock.now in (2.0, 3.0):
        assert known(tokens, "old") == [True]
    assert known(tokens, "old", "new") == [True, True]
    (waited, read) = [record for record in caplog.records if record.levelno >= logging.WARNING and tells(record)]
    assert waited.levelno == read.levelno == logging.WARNING
    assert "empty or half written" in waited.getMessage()


def test_scope_that_is_cut_off_is_not_taken_for_a_wider_one(file: Path, tokens: TokenFile, clock: Clock) -> None:
    """`read:tenant:acme` begins with `read`, which sees all tenants."""
    file.write_text("old *\nnew read")
    clock.now = 1.0
    assert known(tokens, "old", "new") == [True, False]
    file.write_text("old *\nnew read:tenant:acme\n")
    for clock.now in (2.0, 3.0):
        known(tokens, "new")
    found = tokens.find("new")
    assert found is not None
    assert found.scope == "read:tenant:acme"


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "by mv"])
def test_operator_can_lock_everybody_out(file: Path, tokens: TokenFile, clock: Clock, replace: bool) -> None:
    """A file that stays empty counts at the next look."""
    if replace:
        put(file, "")
    else:
        file.write_text("")
    clock.now = 1.0
    assert known(tokens, "old") == [True]
    clock.now = 2.0
    assert known(tokens, "old") == [False]


def test_token_that_nobody_used_meanwhile_does_not_live_on(file: Path, tokens: TokenFile, clock: Clock) -> None:
    """The file was emptied in place a minute ago: the first call with it is refused already."""
    file.write_text("")
    aged(file)
    clock.now = 60.0
    assert known(tokens, "old") == [False]


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, True), (0o604, True)])
def test_plain_secrets_that_others_can_read_are_warned_of(
    file: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    """Of digests nobody is: they open nothing."""
    file.chmod(mode)
    TokenFile(file)
    assert ("chmod 600" in caplog.text) == warned
    caplog.clear()
    file.write_text(new_token("*")[2])
    TokenFile(file)
    assert caplog.text == ""


def test_open_tokens_takes_the_environment_where_no_file_is_named(file: Path) -> None:
    """And the file alone where one is."""
    environ = {"METERED_BILLING_TOKENS": "s=*"}
    assert open_tokens(None, environ).find("s") is not None
    assert open_tokens(file, environ).find("s") is None


def test_add_line_makes_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """And adds to it, leaving its mode, its comments, and a last line without an end as they are."""
    file = tmp_path / "new"
    first, second = new_token("*")[2], new_token("admin")[2]
    add_line(file, first)
    assert file.read_text() == f"{first}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(f"# mine\n{first}")
    file.chmod(0o640)
    add_line(file, second)
    assert file.read_text() == f"# mine\n{first}\n{second}\n"
    assert file.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_add_line_follows_a_link(file: Path, tmp_path: Path) -> None:
    """What is linked to is changed, and the link stays one."""
    link = tmp_path / "link"
    link.symlink_to(file)
    add_line(link, new_token("*")[2])
    assert link.is_symlink()
    assert len(Tokens.read(file)) == 2


def test_add_line_leaves_a_file_alone_that_it_cannot_read(file: Path) -> None:
    """What is wrong in it is said first."""
    file.write_text("hush everything\n")
    with pytest.raises(InvalidTokens, match="line 1"):
        add_line(file, new_token("*")[2])
    assert file.read_text() == "hush everything\n"


def test_add_line_where_nothing_can_be_written(tmp_path: Path) -> None:
    """One sentence says why."""
    with pytest.raises(InvalidTokens, match="No such file or directory"):
        add_line(tmp_path / "nowhere" / "tokens", new_token("*")[2])


def test_two_that_add_at_once_lose_nothing(file: Path) -> None:
    """Each waits for the other."""
    lines = [new_token("*")[2] for _ in range(16)]
    threads = [threading.Thread(target=add_line, args=(file, line)) for line in lines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Tokens.read(file)) == 17


def test_remove_token_takes_out_its_line_alone(file: Path) -> None:
    """Comments stay, and so does everything else."""
    _, token, line = new_token("tenant:acme")
    add_line(file, line)
    assert remove_token(file, token.id).scope == "tenant:acme"
    assert file.read_text() == "# the app's\nold *\n"


@pytest.mark.parametrize("unknown", ["", "01234567", "sha256"])
def test_remove_token_that_is_not_there(file: Path, unknown: str) -> None:
    """Is refused, and the file stays."""
    with pytest.raises(InvalidTokens, match="there is no token"):
        remove_token(file, unknown)
    assert file.read_text() == "# the app's\nold *\n"


def test_remove_token_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Is refused, and none is made."""
    with pytest.raises(InvalidTokens, match="No such file"):
        remove_token(tmp_path / "nope", "01234567")
    assert not list(tmp_path.iterdir())


def test_failed_replacement_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk is full, say: and nothing beside it."""

    def full(self: Path, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InvalidTokens, match="No space left"):
        add_line(file, new_token("*")[2])
    assert file.read_text() == "# the app's\nold *\n"
    assert list(file.parent.iterdir()) == [file]
