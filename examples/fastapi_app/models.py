"""What goes in and what comes out of the demo's routes."""

from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

MAX_IMAGES = 100
"""Images in one request."""

MAX_BASE64_LENGTH = 14_000_000
"""Characters of one image: about 10 MB of it."""

Name = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")]


class ImageIn(BaseModel):
    """One picture to cut out."""

    id: Name
    data: Annotated[str, Field(max_length=MAX_BASE64_LENGTH, description="The image file in base64.")]


class ProductGroup(BaseModel):
    """Pictures of one product."""

    name: Name
    images: list[ImageIn]


class CreateProducts(BaseModel):
    """Products and their pictures. The ids of the pictures are unique in the whole request."""

    product_groups: Annotated[list[ProductGroup], Field(max_length=MAX_IMAGES)]

    @property
    def images(self) -> list[ImageIn]:
        """The pictures of all the groups."""
        return [image for group in self.product_groups for image in group.images]

    @model_validator(mode="after")
    def _check_images(self) -> "CreateProducts":
        _check(self.images)
        return self


class Batch(BaseModel):
    """Pictures, without groups."""

    images: list[ImageIn]

    @model_validator(mode="after")
    def _check_images(self) -> "Batch":
        _check(self.images)
        return self


class ImageOut(BaseModel):
    """What became of one picture: a `url` where it succeeded, an `error` where it failed."""

    id: str
    status: Literal["succeeded", "failed"]
    url: str | None = None
    error: str | None = None


class Product(BaseModel):
    """The pictures of one product, cut out."""

    name: str
    images: list[ImageOut]


class ProductsCreated(BaseModel):
    """The products, in the order of the request."""

    products: list[Product]


class BatchDone(BaseModel):
    """The pictures, in the order of the request."""

    results: list[ImageOut]


def _check(images: Iterable[ImageIn]) -> None:
    # Every id is paid for, and refunded, by its name: two of one name could not be told apart.
    seen: set[str] = set()
    for image in images:
        if image.id in seen:
            raise ValueError(f"the image id {image.id!r} stands twice")
        seen.add(image.id)
    if len(seen) > MAX_IMAGES:
        raise ValueError(f"{len(seen)} images; at most {MAX_IMAGES} go into one request")
