"""Read pictures and animations: Pillow composes their frames, pillow-heif reads HEIC; colours become sRGB."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.error import FFmpegError, PatchWelcomeError
from PIL import Image, ImageCms, UnidentifiedImageError

from sora_jax.data.fit import crop_box
from sora_jax.data.reading.damage import check_units, length_bytes, listening
from sora_jax.data.reading.hdr import HLG, PQ, to_srgb
from sora_jax.data.reading.tracks import Damage, Draw, Fit, FrameSource, Input, MediaError, check_pixels, reason

warnings.filterwarnings("ignore", module="PIL")  # of EXIF that is broken, which costs no picture

# By name, so that formats which run programs or point to other files (EPS, PDF, WMF) are not tried.
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000")
ANIMATED_FORMATS = ("PNG", "WEBP", "AVIF")
STILL_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"heim": "HEIC", b"heis": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}
MAX_FRAMES = 2**16
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
         8: "ROTATE_90"}  # fmt: skip
SEEN_IN_METADATA = ("EXIF", "IFD", "ICC", "APP fields", "decode_app")  # in messages of libav that cost no picture
HDR_AVIF = re.compile(rb"colrnclx..\0[\x10\x12]", re.DOTALL)  # primaries, then PQ or HLG (ISO 14496-12, 12.1.5)
SAME = 3  # levels: a profile that moves no colour by more is sRGB under another name


@contextmanager
def open_picture(file: Input) -> Iterator[FrameSource]:
    """Open the one frame of a picture or the frames of an animation; PIL.UnidentifiedImageError for other files."""
    with open(file, "rb") if isinstance(file, str | Path) else nullcontext(file) as opened:
        image = _open(opened)
        animated = getattr(image, "is_animated", False)
        if animated and image.format == "GIF":
            raise UnidentifiedImageError("animated GIFs are read as videos, which is faster")
        moving = animated and image.format in ANIMATED_FORMATS
        yield _animation(image, opened) if moving else _still(image, opened, animated)


def _open(file: BinaryIO) -> Any:  # PIL's ImageFile does not declare what its subclasses have
    file.seek(0)
    head = file.read(4096)
    brand = STILL_BRANDS.get(head[8:12]) if head[4:8] == b"ftyp" else None
    heic = brand == "HEIC" and b"avif" not in head[:64]
    try:
        image: Any = _open_heic(file) if heic else Image.open(file, "r", PICTURE_FORMATS)
    except (UnidentifiedImageError, SyntaxError) as error:
        if brand:  # libav would take the first tile of a grid for the picture
            raise MediaError(f"unreadable: no picture can be read from this {brand} file") from error
        raise
    check_pixels(*image.size)
    if image.format == "AVIF" and HDR_AVIF.search(head) and b"grid" not in head:  # libav has only tiles of a grid
        raise UnidentifiedImageError("HDR is read as a video, as Pillow leaves its curve")
    if image.format == "TIFF" and (50706 in image.tag_v2 or image.tag_v2.get(254, 0) & 1):  # DNG, or a thumbnail
        raise MediaError("unreadable: a raw photo, of which only a preview can be read; export it as JPEG or HEIC")
    return image


def _open_heic(file: BinaryIO) -> Image.Image:
    """Open the primary picture of a HEIC file; libheif joins the tiles of a grid, turns and mirrors."""
    from pillow_heif import HeifImageFile, open_heif

    image = HeifImageFile(file)
    transfer = image.info.get("nclx_profile", {}).get("transfer_characteristics")
    if transfer in (PQ, HLG) and image.info["bit_depth"] > 8 and image.mode == "RGB":
        check_pixels(*image.size)
        deep = open_heif(file, convert_hdr_to_8bit=False)  # holds the memory of its array
        image.paste(Image.fromarray(to_srgb(np.asarray(deep), transfer)))
    return image


def _still(image: Any, file: BinaryIO, several: bool) -> FrameSource:
    def frames(start: float) -> Iterator[tuple[float, Draw]]:
        if image.format == "PNG":
            _open(file).verify()  # its check sums, which Pillow passes over while it decodes
        if image.format in ("JPEG", "MPO"):
            check_jpeg(file)
        if image.format == "HEIF":
            check_heic(file)
        yield 0.0, partial(draw, image)

    flags = []
    if several and image.format in ("HEIF", "TIFF"):
        flags.append(f"several: picture {image.tell() + 1} of {image.n_frames}, the others are left out")
    return FrameSource(np.zeros(1), 1.0, frames, flags)


def check_heic(file: BinaryIO) -> None:
    """Raise Damage where a HEIC file is cut off or holds a zeroed block: libheif leaves the tiles in it grey."""
    file.seek(0)
    with suppress(FFmpegError), av.open(file, "r", metadata_errors="replace") as container:
        for packet in container.demux(container.streams.video):
            if packet.is_corrupt:
                raise Damage("the file ends before its picture does")
            context = packet.stream.codec_context
            if prefix := length_bytes(context.name, context.extradata):
                check_units(context.name, bytes(packet), prefix)


def check_jpeg(file: BinaryIO) -> None:
    """Raise Damage for an error that libav's decoder finds in the coded data of a JPEG: libjpeg only warns of it."""
    file.seek(0)
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count, decoder.options = 1, {"err_detect": "crccheck+bitstream+buffer+explode"}
    with listening() as log:
        try:
            decoder.decode(av.Packet(file.read()))
        except PatchWelcomeError:
            return  # a kind of JPEG that libav does not decode
        except FFmpegError as error:
            log.append((0, "", str(error.strerror)))
    for _, _, text in log:
        if not any(word in text for word in SEEN_IN_METADATA):
            raise Damage(" ".join(text.split()))


def _animation(image: Any, file: BinaryIO) -> FrameSource:
    """Decode all frames once for their durations, up to the first damage."""
    durations, damage = [], ""
    first = int(getattr(image, "default_image", False))  # an APNG's poster is not part of its film
    try:
        for index in range(first, min(image.n_frames, MAX_FRAMES)):
            image.seek(index)
            image.load()
            milliseconds = image.info.get("duration", 0)
            # Browsers show frames of at most 10 ms for 100 ms, and makers of animations count on it.
            durations.append(milliseconds / 1000 if milliseconds > 10 else 0.1)
    except Exception as error:
        damage = reason(error)
        if not durations:
            raise MediaError(f"damaged: {damage}, in the first frame") from error
    ends = np.cumsum(durations)
    times = ends - durations

    def frames(start: float) -> Iterator[tuple[float, Draw]]:
        again = _open(file)  # as Pillow does not always find the way back from damage
        for i, time in enumerate(times):
            again.seek(first + i)
            yield time, partial(draw, again.copy())
        if damage:
            raise Damage(damage)

    return FrameSource(times, ends[-1], frames)


def draw(image: Image.Image, fit: Fit | None) -> np.ndarray:
    """Render a picture as a frame: upright, in sRGB, over white, of the size that `fit` gives."""
    profile = image.info.get("icc_profile") or b""
    image = _eight_bits(_upright(image), profile)
    if image.mode == "RGBA":  # blended in full size: scaled before, transparent parts would show their colours
        alpha = image.getchannel("A")
        image, profile = _to_srgb(image.convert("RGB"), profile), b""
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(_to_srgb(scaled(image, (image.height, image.width), fit), profile))


def _upright(image: Image.Image) -> Image.Image:
    """Turn and mirror as EXIF says (ImageOps.exif_transpose raises where other tags are broken)."""
    image.load()
    try:
        turn = TURNS.get(image.getexif()[0x0112])  # Orientation
    except Exception:  # no EXIF, or broken
        turn = None
    return image.transpose(Image.Transpose[turn]) if turn else image


def _eight_bits(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert to RGB, RGBA, L or, where a profile tells its colours, CMYK."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        step = 257 if "16" in image.mode or deep.max() > 255 else 1  # the mode I does not say how many bits there are
        return Image.fromarray((deep // step).clip(0, 255).astype(np.uint8))
    if image.mode == "F":
        raise MediaError("unreadable: a picture of floating-point numbers has no known white")
    if image.has_transparency_data:
        return image.convert("RGBA")
    return image if image.mode == "L" or (image.mode == "CMYK" and profile) else image.convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    if profile[16:20] == b"GRAY" and image.mode == "RGB" and not np.ptp(np.asarray(image), axis=2).any():
        image = image.convert("L")  # which had a palette or transparency
    transform = _transform(profile, image.mode) if profile else None
    return transform.apply(image) if transform else image.convert("RGB")


@lru_cache(8)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB; None if the profile is broken, of another mode, or sRGB itself."""
    cube = np.moveaxis(51 * np.indices((6, 6, 6)), 0, 3).reshape(36, 6, 3).astype(np.uint8)
    colours = Image.fromarray(cube).convert(mode)
    try:
        source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, mode, "RGB")
        moved = np.asarray(transform.apply(colours)).astype(int) - np.asarray(colours.convert("RGB"))
    except (ImageCms.PyCMSError, OSError):
        return None
    return transform if mode == "CMYK" or abs(moved).max() > SAME else None


def scaled(image: Image.Image, size: tuple[int, int], fit: Fit | None) -> Image.Image:
    """Resample once from the stored picture, which has `size` with square pixels, to the wanted size."""
    target = fit(*size) if fit else size
    if (image.height, image.width) == target:
        return image
    left, top, right, bottom = crop_box(*size, *target)
    across, down = image.width / size[1], image.height / size[0]
    box = left * across, top * down, right * across, bottom * down
    return image.resize(target[::-1], Image.Resampling.LANCZOS, box)
