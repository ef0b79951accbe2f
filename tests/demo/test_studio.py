"""Pictures are cut out side by side, a few at a time, and kept under names that nobody can guess."""

import base64
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

from examples.fastapi_app.cutout import NotAnImage
from examples.fastapi_app.models import ImageIn
from examples.fastapi_app.studio import WORKERS, Studio

pytestmark = pytest.mark.anyio


def image(image_id: str, data: bytes = b"picture") -> ImageIn:
    return ImageIn(id=image_id, data=base64.b64encode(data).decode())


def only_pictures(data: bytes) -> bytes:
    if data != b"picture":
        raise NotAnImage("not an image")
    return b"cut"


async def test_cut_all_failed_picture_leaves_the_others(tmp_path: Path) -> None:
    """A picture that fails says why, in its place; the others are kept and can be fetched."""
    studio = Studio(tmp_path / "made" / "here", only_pictures)
    first, failed, no_base64, last = await studio.cut_all(
        [image("a"), image("b", b"text"), ImageIn(id="c", data="näh!"), image("d")]
    )
    assert (failed.id, failed.status, failed.error, failed.url) == ("b", "failed", "not an image", None)
    assert (no_base64.status, no_base64.error) == ("failed", "not base64")
    for done in (first, last):
        assert (done.status, done.error) == ("succeeded", None)
        assert done.url is not None
        path = studio.path(done.url.removeprefix("/images/"))
        assert path is not None
        assert path.read_bytes() == b"cut"
    assert first.url != last.url


async def test_cut_all_many_pictures_a_few_at_a_time(tmp_path: Path) -> None:
    """However many arrive, no more threads work than there are workers."""
    lock, working, most = threading.Lock(), 0, 0

    def slow(data: bytes) -> bytes:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
        time.sleep(0.01)
        with lock:
            working -= 1
        return b"cut"

    done = await Studio(tmp_path, slow).cut_all([image(str(number)) for number in range(20)])
    assert [result.id for result in done] == [str(number) for number in range(20)]
    assert most == WORKERS


async def test_cut_all_bug_in_the_cutter_is_not_hidden(tmp_path: Path) -> None:
    """Only pictures fail quietly; a bug raises, so that everything is refunded."""

    def broken(data: bytes) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup):
        await Studio(tmp_path, broken).cut_all([image("a"), image("b")])


@pytest.mark.parametrize(
    "name", ["../secret.png", "..", "", "/etc/passwd", "secret.png", "0" * 32 + ".png\n", "0" * 32 + ".png"]
)
async def test_path_other_names_are_not_files(tmp_path: Path, name: str) -> None:
    """Only results have paths: nothing outside the folder, nothing else inside it."""
    (tmp_path / "secret.png").write_bytes(b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "secret.png").write_bytes(b"")
    assert Studio(tmp_path / "images", only_pictures).path(name) is None
