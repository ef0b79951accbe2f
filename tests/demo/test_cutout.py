"""Pictures in, pictures without their background out; hostile bytes in, a reason out."""

import io
import struct
import zlib
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

import numpy as np
from examples.fastapi_app import cutout
from examples.fastapi_app.cutout import Cutter, NotAnImage
from PIL import Image, ImageDraw

SAMPLES = Path(cutout.__file__).parent / "samples"

with_model = pytest.mark.skipif(
    cutout.find_model() is None, reason="the cut-out model is not installed: `make .venv/.demo`"
)


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def disc(ground: str = "white", colour: str = "darkred", size: int = 200) -> Image.Image:
    """An object on a plain ground."""
    image = Image.new("RGB", (size, size), ground)
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, size * 3 // 4, size * 3 // 4), fill=colour)
    return image


def alpha_of(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGBA")
    return image.getchannel("A")


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


CUTTERS = [
    pytest.param(cutout.flood_cutter, id="flood"),
    pytest.param(cutout.cutter("stub"), id="stub"),
    pytest.param(None, id="model", marks=with_model),
]


@pytest.fixture(params=CUTTERS)
def cut(request: pytest.FixtureRequest) -> Cutter:
    return request.param or cutout.cutter("model")


@pytest.mark.parametrize("ground", ["white", "black", "#8090a0"])
def test_flood_plain_ground_keeps_the_object_alone(ground: str) -> None:
    """What joins the border goes, whatever its colour; the object in the middle stays."""
    alpha = alpha_of(cutout.flood_cutter(file_of(disc(ground))))
    assert alpha.size == (200, 200)
    assert alpha.getpixel((100, 100)) == 255
    assert alpha.getpixel((3, 3)) == alpha.getpixel((196, 100)) == 0


@with_model
def test_model_sample_photo_keeps_the_cup_alone() -> None:
    """The model finds the cup on its wooden table."""
    alpha = alpha_of(cutout.cutter("model")((SAMPLES / "coffee.jpg").read_bytes()))
    width, height = alpha.size
    opacity = np.asarray(alpha)
    assert opacity[height // 2, width * 48 // 100] > 240
    assert opacity[3, 3] < 15
    assert opacity[3, width - 4] < 15


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"2 cups\n1 lamp\n", id="text"),
        pytest.param(b"\x00" * 4096, id="zeros"),
        pytest.param(b"\xff\xd8\xff\xe0", id="the start of a JPEG"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="the signature of a PNG"),
        pytest.param(b"GIF89a", id="the signature of a GIF"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", id="EPS, a program"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="SVG"),
    ],
)
def test_cut_no_image_is_refused(cut: Cutter, data: bytes) -> None:
    """Bytes that are no image are told apart from bugs: `NotAnImage`, with a reason for the customer."""
    with pytest.raises(NotAnImage, match="image"):
        cut(data)


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_open_image_truncated_file_is_refused(keep: float) -> None:
    """An upload that broke off is not cut out as if the rest were grey."""
    whole = (SAMPLES / "coffee.jpg").read_bytes()
    with pytest.raises(NotAnImage, match="damaged image"):
        cutout.open_image(whole[: int(len(whole) * keep)])


def test_open_image_flipped_bytes_never_raise_anything_else() -> None:
    """Damage at any place is either survived or reported as `NotAnImage`."""
    whole = file_of(disc(size=64))
    for place in range(8, len(whole)):
        try:
            cutout.open_image(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        except NotAnImage:
            continue


@pytest.mark.parametrize(("width", "height"), [(5001, 5000), (7000, 7000), (2**31 - 1, 2**31 - 1)])
def test_open_image_pixel_bomb_is_refused_unread(width: int, height: int) -> None:
    """A few bytes that claim gigapixels are refused before anything is unpacked."""
    with pytest.raises(NotAnImage, match="too many pixels"):
        cutout.open_image(png_that_claims(width, height))


def test_open_image_large_picture_comes_out_bounded() -> None:
    """The work on one picture is bounded, whatever its size."""
    image = cutout.open_image(file_of(Image.new("RGB", (4000, 1000)), "JPEG"))
    assert max(image.size) <= cutout.MAX_SIDE


def test_open_image_turned_photo_stands_upright() -> None:
    """A camera's note about which side is up is obeyed."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert cutout.open_image(file_of(Image.new("RGB", (40, 20)), "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_cut_every_kind_of_pixel_works(cut: Cutter, mode: str) -> None:
    """Grey, palette, transparent and deep pictures are cut out like any other."""
    assert alpha_of(cut(file_of(Image.new(mode, (30, 20)))))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1)])
def test_cut_thinnest_pictures_work(cut: Cutter, size: tuple[int, int]) -> None:
    """A line of pixels is a picture too."""
    assert alpha_of(cut(file_of(Image.new("RGB", size))))


def test_cutter_without_model_floods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model does not install, the demo still works; where it was asked for, it says so."""
    monkeypatch.setattr(cutout, "find_model", lambda: None)
    assert cutout.cutter() is cutout.flood_cutter
    with pytest.raises(RuntimeError, match="not installed"):
        cutout.cutter("model")


def test_cutter_unknown_kind_is_refused() -> None:
    """A misspelt setting is not taken for the default."""
    with pytest.raises(ValueError, match="stubb"):
        cutout.cutter("stubb")
