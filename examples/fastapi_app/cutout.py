"""Cut a picture's subject out of its background: bytes of an image in, bytes of a PNG out.

Offline, with the U2-Net model that the demo's install brings along. Without the model the background is
what a flood from the border reaches: good enough for an object on a plain ground.
"""

import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError

Cutter = Callable[[bytes], bytes]
"""Image file in, PNG with transparency out; raises `NotAnImage`."""

MAX_PIXELS = 25_000_000
"""A file of a few kilobytes can claim to be gigapixels; beyond this it is refused before it is unpacked."""

MAX_SIDE = 1600
"""Pixels on the longer side of what comes out; bounds the work on one picture."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is read. Pillow knows forty more, some of which run other programs (EPS)."""

MODEL_SIDE = 320
"""The model's input: 320 x 320, as it was trained."""

# Pillow only warns up to twice its limit.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class NotAnImage(ValueError):
    """These bytes cannot be cut out; the message says why, for the customer."""


def cutter(kind: str | None = None) -> Cutter:
    """The best cutter there is, or the one asked for: "model", "flood" or "stub"."""
    if kind == "stub":
        return stub
    if kind == "flood":
        return flood_cutter
    if kind not in (None, "", "model"):
        raise ValueError(f"{kind!r} is none of model, flood and stub")
    model = find_model()
    if model is not None:
        return ModelCutter(model)
    if kind == "model":
        raise RuntimeError("the model is not installed: see `make demo`")
    return flood_cutter


def find_model() -> Path | None:
    """The model file inside the `rembg` package, which is not imported: it would want OpenCV."""
    spec = importlib.util.find_spec("rembg")
    if spec is None or importlib.util.find_spec("onnxruntime") is None:
        return None
    for folder in spec.submodule_search_locations or ():
        path = Path(folder) / "u2netp.onnx"
        if path.is_file():
            return path
    return None


def open_image(data: bytes) -> Image.Image:
    """Unpack an image of at most `MAX_PIXELS`, the right way up, at most `MAX_SIDE` long, as RGB.

    Raises:
        NotAnImage: It is none, is cut off, or is too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("RGB", (MAX_SIDE, MAX_SIDE))  # large JPEGs are read at half or quarter size
            upright = ImageOps.exif_transpose(image)
            upright.thumbnail((MAX_SIDE, MAX_SIDE))
            return upright.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise NotAnImage("too many pixels") from error
    except UnidentifiedImageError as error:
        raise NotAnImage("not an image") from error
    except Exception as error:  # Pillow's decoders answer hostile bytes with half the built-in exceptions
        raise NotAnImage("damaged image") from error


class ModelCutter:
    """U2-Net (small) on onnxruntime. Safe to call from several threads."""

    def __init__(self, path: Path) -> None:
        # Imported here: the other cutters work without it.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # The app's worker threads are the parallelism; the model must not take the other cores as well.
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0].name

    def __call__(self, data: bytes) -> bytes:
        image = open_image(data)
        return _composite(image, self.mask(image))

    def mask(self, image: Image.Image) -> Image.Image:
        """What is subject: white; what is ground: black; of the image's own size."""
        small = image.resize((MODEL_SIDE, MODEL_SIDE), Image.Resampling.LANCZOS)
        pixels = np.asarray(small, dtype=np.float32)
        pixels /= max(float(pixels.max()), 1.0)
        # ImageNet's mean and standard deviation, which the model was trained with.
        pixels = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        batch = pixels.transpose(2, 0, 1)[np.newaxis].astype(np.float32)
        saliency = np.asarray(self._session.run(None, {self._input: batch})[0])[0, 0]
        lowest, highest = float(saliency.min()), float(saliency.max())
        stretched = (saliency - lowest) / max(highest - lowest, 1e-6)
        mask = Image.fromarray((stretched * 255).astype(np.uint8))
        return mask.resize(image.size, Image.Resampling.LANCZOS)


def flood_cutter(data: bytes) -> bytes:
    """Without the model: the ground is what a flood from the border reaches."""
    image = open_image(data)
    return _composite(image, flood_mask(image))


def flood_mask(image: Image.Image, tolerance: int = 60) -> Image.Image:
    """Like `ModelCutter.mask`, by colour alone: ground is what joins the border and is like it.

    Args:
        tolerance: How far a colour may lie from the border's, summed over red, green and blue.
    """
    # Pixel by pixel in Python, hence on a small copy; its pure black and white are kept free for "reached".
    small = ImageOps.contain(image, (MODEL_SIDE, MODEL_SIDE)).filter(ImageFilter.MedianFilter(3))
    small = small.point([min(max(value, 1), 254) for value in range(256)] * 3)
    black, white = (0, 0, 0), (255, 255, 255)
    width, height = small.size
    border = [(x, y) for x in range(0, width, 8) for y in (0, height - 1)]
    border += [(x, y) for y in range(0, height, 8) for x in (0, width - 1)]
    for seed in border:
        colour = small.getpixel(seed)
        if isinstance(colour, tuple) and colour not in (black, white):
            # The one that is unlike what it floods, or Pillow takes it for flooded already.
            ImageDraw.floodfill(small, seed, white if sum(colour) < 382 else black, thresh=tolerance)
    pixels = np.asarray(small)
    ground = (pixels == 0).all(axis=2) | (pixels == 255).all(axis=2)
    mask = Image.fromarray(np.where(ground, 0, 255).astype(np.uint8))
    return mask.resize(image.size).filter(ImageFilter.GaussianBlur(1))


def stub(data: bytes) -> bytes:
    """Instant, for load tests: reads no more than the header; what comes out is one clear pixel."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except Exception as error:
        raise NotAnImage("not an image") from error
    return _CLEAR_PIXEL


def _composite(image: Image.Image, mask: Image.Image) -> bytes:
    cut = image.copy()
    cut.putalpha(mask)
    return _png(cut)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


_CLEAR_PIXEL = _png(Image.new("RGBA", (1, 1)))
