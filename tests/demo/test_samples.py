"""The pictures that ship with the demo."""

import base64
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="Pillow is not installed: `make .venv/.demo`")

from examples.fastapi_app import samples
from examples.fastapi_app.cutout import NotAnImage, open_image
from examples.fastapi_app.models import CreateProducts

FOLDER = Path(samples.__file__).parent
FILES = sorted(FOLDER.glob("*.jpg"))


def test_sample_request_ten_pictures_two_broken() -> None:
    """Ten valid entries, of which exactly the two that are called broken cannot be opened."""
    images = CreateProducts.model_validate(samples.sample_request()).images
    assert len(images) == 10
    broken = set()
    for image in images:
        try:
            open_image(base64.b64decode(image.data))
        except NotAnImage:
            broken.add(image.id)
    assert broken == set(samples.BROKEN)


def test_samples_are_small() -> None:
    """They ship with the source: none over 60 kB, all of them under 500 kB."""
    sizes = [file.stat().st_size for file in FILES]
    assert max(sizes) < 60_000
    assert sum(sizes) < 500_000


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_samples_licence_of_each_is_stated(file: Path) -> None:
    """Where each picture is from, and that it may be copied, stands beside it; and each is used."""
    assert f"`{file.name}`" in (FOLDER / "LICENSES.md").read_text()
    assert file.name in [name for names in samples.GROUPS.values() for name in names]
