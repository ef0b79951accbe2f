"""Where the pictures are cut out: in a few worker threads, so that the app's event loop stays free."""

import asyncio
import base64
import binascii
import os
import re
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import anyio
import anyio.to_thread
from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode

from .cutout import Cutter, NotAnImage, cutter
from .models import ImageIn, ImageOut

WORKERS = min(os.cpu_count() or 1, 4)
"""Pictures that are cut at the same time; the others wait for their turn."""

_NAME = re.compile(r"[0-9a-f]{32}\.png")


class Studio:
    """Cuts pictures out and keeps the results.

    Args:
        folder: Where the results are kept; made where it is missing.
        cut: What cuts out.
        delay_s: What each picture takes longer, for whoever wants to pull the plug in the middle.
    """

    def __init__(self, folder: Path, cut: Cutter, *, delay_s: float = 0.0) -> None:
        self._folder = folder
        self._cut = cut
        self._delay_s = delay_s
        self._limiter = anyio.CapacityLimiter(WORKERS)

    @classmethod
    def from_environment(cls) -> "Studio":
        """As `METERED_BILLING_DEMO_CUTOUT`, `_DELAY_S` and `_IMAGES` say."""
        return cls(
            Path(os.environ.get("METERED_BILLING_DEMO_IMAGES", ".demo/images")),
            cutter(os.environ.get("METERED_BILLING_DEMO_CUTOUT")),
            delay_s=float(os.environ.get("METERED_BILLING_DEMO_DELAY_S", "0")),
        )

    async def cut_all(self, images: Iterable[ImageIn]) -> list[ImageOut]:
        """Cut out each picture. One that fails is reported as failed, and never disturbs the others."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._one(image)) for image in images]
        return [task.result() for task in tasks]

    def path(self, name: str) -> Path | None:
        """The file of a result, or None where there is none of this name."""
        path = self._folder / name
        return path if _NAME.fullmatch(name) and path.is_file() else None

    async def _one(self, image: ImageIn) -> ImageOut:
        try:
            # The context goes along into the thread, and with it the span that this one belongs under.
            name = await anyio.to_thread.run_sync(self._traced, image, limiter=self._limiter)
        except NotAnImage as error:
            return ImageOut(id=image.id, status="failed", error=str(error))
        return ImageOut(id=image.id, status="succeeded", url=f"/images/{name}")

    def _traced(self, image: ImageIn) -> str:
        """The picture's work under a span of its own, which ends with it."""
        with trace.get_tracer("cutouts").start_as_current_span(
            "cut out",
            attributes={"demo.image.id": image.id},
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                name = self._cut_and_keep(image.data)
            except Exception as error:
                span.set_attributes({"demo.image.status": "failed", "demo.image.error": str(error)})
                if not isinstance(error, NotAnImage):  # one picture that is none is nobody's error
                    span.set_attribute("error.type", type(error).__qualname__)
                    span.set_status(Status(StatusCode.ERROR))
                raise
            span.set_attribute("demo.image.status", "succeeded")
            return name

    def _cut_and_keep(self, data: str) -> str:
        time.sleep(self._delay_s)
        try:
            picture = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError) as error:
            raise NotAnImage("not base64") from error
        png = self._cut(picture)
        # A name that cannot be guessed is all that protects a picture: enough for a demo.
        name = f"{secrets.token_hex(16)}.png"
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / name).write_bytes(png)
        return name
