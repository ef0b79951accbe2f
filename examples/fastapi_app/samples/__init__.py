"""The sample pictures, as a request for `POST /create-products`: ten of them, and two are broken."""

import base64
from pathlib import Path
from typing import Any

GROUPS = {
    "Cup": ["coffee.jpg", "mug.jpg", "cut-off.jpg"],
    "Home": ["lamp.jpg", "vase.jpg", "shopping-list.jpg"],
    "Poster": ["astronaut.jpg", "camera.jpg", "chelsea.jpg", "rocket.jpg"],
}

BROKEN = ("cut-off", "shopping-list")
"""The ids of those that cannot be cut out."""

_HERE = Path(__file__).parent


def sample_request() -> dict[str, Any]:
    """The body, ready for JSON. The id of a picture is its file's name without `.jpg`."""
    return {
        "product_groups": [
            {"name": name, "images": [_image(_HERE / file) for file in files]} for name, files in GROUPS.items()
        ]
    }


def _image(path: Path) -> dict[str, str]:
    return {"id": path.stem, "data": base64.b64encode(path.read_bytes()).decode()}
