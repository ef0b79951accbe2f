"""The demo's pages, opened."""

import pytest

from .conftest import Open

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("browser")]


def test_page_opens_without_errors(open_page: Open) -> None:
    """It logs nothing, asks no other host, and says what it is."""
    page = open_page("/")
    assert page.get_by_role("heading", level=1).count() == 1
