"""What a request to the demo may look like."""

from typing import Any

import pytest
from examples.fastapi_app.models import MAX_IMAGES, Batch, CreateProducts
from pydantic import ValidationError


def images(*ids: str) -> list[dict[str, str]]:
    return [{"id": image_id, "data": ""} for image_id in ids]


def groups(*groups_of_ids: list[str]) -> dict[str, Any]:
    return {"product_groups": [{"name": "Cup", "images": images(*ids)} for ids in groups_of_ids]}


def test_create_products_images_of_all_groups_in_order() -> None:
    """The images are those of all groups, in the request's order."""
    body = CreateProducts.model_validate(groups(["a", "b"], [], ["c"]))
    assert [image.id for image in body.images] == ["a", "b", "c"]


@pytest.mark.parametrize("body", [groups(["a", "a"]), groups(["a"], ["a"])], ids=["one group", "two groups"])
def test_create_products_same_id_twice_is_refused(body: dict[str, Any]) -> None:
    """A refund names images by id, so an id means one image, in whichever group."""
    with pytest.raises(ValidationError, match="'a' stands twice"):
        CreateProducts.model_validate(body)


def test_batch_same_id_twice_is_refused() -> None:
    """As in a product group."""
    with pytest.raises(ValidationError, match="'a' stands twice"):
        Batch.model_validate({"images": images("a", "b", "a")})


def test_create_products_too_many_images_are_refused() -> None:
    """The bound is on the request, not on the group."""
    ids = [str(number) for number in range(MAX_IMAGES + 1)]
    assert len(CreateProducts.model_validate(groups(ids[:50], ids[50:100])).images) == MAX_IMAGES
    with pytest.raises(ValidationError, match="at most 100"):
        CreateProducts.model_validate(groups(ids[:50], ids[50:]))


@pytest.mark.parametrize("image_id", ["", "a" * 101, "a\nb", "a\x00", "a\n", 7, None])
def test_batch_unusable_id_is_refused(image_id: object) -> None:
    """Ids go into ledgers and logs: they are short and have no control characters."""
    with pytest.raises(ValidationError):
        Batch.model_validate({"images": [{"id": image_id, "data": ""}]})
