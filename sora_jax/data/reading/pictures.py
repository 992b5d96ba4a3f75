"""Pictures and animations by Pillow, which composes their frames, reads EXIF and knows them by content."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sora_jax.data.fit import crop_box
from sora_jax.data.reading.damage import sound_jpeg, sound_png_frames
from sora_jax.data.reading.tracks import Damage, File, Fit, MediaError, FrameSource, check_pixels, reason

# By name, so that formats which run programs or point to other files (EPS, PDF, WMF) are not tried.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000")
ANIMATED_FORMATS = ("PNG", "WEBP", "AVIF")
MAX_FRAMES = 2**16


@contextmanager
def open_picture(file: File) -> Iterator[FrameSource]:
    """The one frame of a picture or the frames of an animation; PIL.UnidentifiedImageError for others."""
    with _open(file) as image:
        if image.format == "GIF" and image.is_animated:
            raise UnidentifiedImageError("animated GIFs are read as videos, which is faster")
        sound, damage = _sound_frames(image)
        if not (image.format in ANIMATED_FORMATS and getattr(image, "is_animated", False)):
            yield FrameSource(np.zeros(1), 1.0, lambda start: iter([(0.0, partial(draw, image))]))
            return
        first = int(getattr(image, "default_image", False))  # an APNG's poster is not part of its film
        durations, failure = _durations(image, first, sound)
    with _open(file) as image:  # anew, as Pillow does not always find the way back from damage
        yield _animation(image, first, durations, damage or failure)


@contextmanager
def _open(file: File) -> Iterator[Image.Image]:
    if not isinstance(file, str | Path):
        file.seek(0)
    with Image.open(file, formats=PICTURE_FORMATS) as image:
        check_pixels(*image.size)
        yield image


def _sound_frames(image: Image.Image) -> tuple[float, str]:
    """How many frames are free of damage that Pillow does not see, and what it is; MediaError where none is."""
    place, sound, damage = image.fp.tell(), float("inf"), ""
    if image.format == "PNG":
        sound, damage = sound_png_frames(image.fp)
    if image.format == "JPEG":
        sound, damage = sound_jpeg(image.fp)
    image.fp.seek(place)
    if not sound:
        raise MediaError(f"damaged: {damage}")
    return sound, damage


def _animation(image: Image.Image, first: int, durations: list[float], damage: str) -> FrameSource:
    ends = np.cumsum(durations)
    times = np.concatenate([[0.0], ends[:-1]])

    def frames(start: float):
        for i, time in enumerate(times):
            image.seek(first + i)
            yield time, partial(draw, image.copy())
        if damage:
            raise Damage(damage)

    return FrameSource(times, ends[-1], frames)


def _durations(image: Image.Image, first: int, sound: float) -> tuple[list[float], str]:
    """Seconds for each frame up to the end or to the first damage, and what that was."""
    durations = []
    try:
        for index in range(first, first + int(min(image.n_frames - first, sound, MAX_FRAMES))):
            image.seek(index)
            image.load()
            milliseconds = image.info.get("duration", 0)
            # Browsers show frames of at most 10 ms for 100 ms, and makers of GIFs count on it.
            durations.append(milliseconds / 1000 if milliseconds > 10 else 0.1)
    except Exception as error:
        if not durations:
            raise MediaError(f"damaged: {reason(error)}, in the first frame") from error
        return durations, reason(error)
    return durations, ""


def draw(image: Image.Image, fit: Fit | None) -> np.ndarray:
    """A picture as its frame: upright, over white, of the size that `fit` gives."""
    image = _over_white(ImageOps.exif_transpose(image))
    return fitted(image, (image.height, image.width), fit)


def fitted(image: Image.Image, size: tuple[int, int], fit: Fit | None) -> np.ndarray:
    """One resampling from the stored picture, which has `size` with square pixels, to the wanted size."""
    target = fit(*size) if fit else size
    if (image.height, image.width) != target:
        left, top, right, bottom = crop_box(*size, *target)
        across, down = image.width / size[1], image.height / size[0]
        box = left * across, top * down, right * across, bottom * down
        image = image.resize(target[::-1], Image.Resampling.LANCZOS, box)
    return np.asarray(image)


def _over_white(image: Image.Image) -> Image.Image:
    """The picture in RGB of 8 bits, its transparent parts white."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        shallow = deep // 257 if deep.max() > 255 else deep
        return Image.fromarray(shallow.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise MediaError("unreadable: a picture of floating-point numbers has no known white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
