"""Write clips for people, and read back the recipe that a written file carries."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from sora_jax.config import check
from sora_jax.errors import UserError
from sora_jax.files import as_path, replacing

WATCHABLE = 256  # pixels of the shorter side of a file that is looked at


def write_video(path: str | Path, frames: np.ndarray, fps: float, upscale: int = 1, comment: str = "") -> Path:
    """Write uint8 frames (T, H, W, 3) as .mp4 (H.264), .gif, .webp or, where T = 1, .png; return the path.

    upscale: each pixel becomes a square of that side, for clips too small to watch. An odd side of an mp4
    grows by a copy of its last row or column. The file appears under its name only when it is whole; a full
    disk or an unknown ending is a UserError. comment: stored in the file, for `read_comment`.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise UserError(f"the frames are {frames.dtype} {frames.shape}; they must be uint8 (T, H, W, 3)")
    check_ending(path, len(frames))
    return write_chunks(path, iter([frames]), fps, upscale, comment)


def write_chunks(
    path: str | Path, chunks: Iterator[np.ndarray], fps: float, upscale: int = 1, comment: str = ""
) -> Path:
    """Write a clip that comes in parts (T, H, W, 3), see `write_video`; of an mp4 one part at a time is in memory."""
    path = as_path(path)
    large = (chunk.repeat(upscale, axis=1).repeat(upscale, axis=2) for chunk in chunks)
    with replacing(path) as temporary:
        WRITERS[path.suffix.lower()](temporary, large, fps, comment)
    return path


def watchable_scale(clip: np.ndarray) -> int:
    """Return the whole factor that brings the shorter side of a clip nearest to WATCHABLE pixels; at least 1."""
    return max(1, round(WATCHABLE / min(clip.shape[1:3])))


def check_ending(path: str | Path, frames: int, option: str = "--out") -> None:
    """Raise UserError unless a clip of so many frames can be written under this name; call it before generating."""
    endings = [ending for ending in WRITERS if frames == 1 or ending != ".png"]
    check(
        as_path(path).suffix.lower() in endings,
        f"{option} is {path}; it must end in {', '.join(endings[:-1])} or {endings[-1]} for {frames} frame(s)",
    )


def save_png(path: str | Path, image: np.ndarray) -> Path:
    """Write one uint8 picture (H, W, 3) as PNG."""
    return write_video(as_path(path).with_suffix(".png"), image[None], 1.0)


def _write_mp4(path: Path, chunks: Iterator[np.ndarray], fps: float, comment: str) -> None:
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frames = (frame for chunk in chunks for frame in chunk)
    first = next(frames)
    odd = ((0, first.shape[0] % 2), (0, first.shape[1] % 2), (0, 0))
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(60000))
        stream.height, stream.width = first.shape[0] + odd[0][1], first.shape[1] + odd[1][1]
        # One thread, of libav and of x264: with more, equal frames give another file almost every time.
        stream.codec_context.thread_count = 1
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16", "preset": "medium", "x264-params": "threads=1"}
        # Untagged, players guess the matrix from the size, and colours shift between small and large clips.
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU709, ColorRange.MPEG
        for pixels in itertools.chain([first], frames):
            frame = av.VideoFrame.from_ndarray(np.pad(pixels, odd, mode="edge"), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)))
        container.mux(stream.encode())


def _write_animation(path: Path, chunks: Iterator[np.ndarray], fps: float, comment: str) -> None:
    frames = np.concatenate(list(chunks))
    first, *rest = [Image.fromarray(frame) for frame in frames]
    # Rounded as sums, so that a rate that does not divide 100 (GIF) or 1000 keeps the right duration.
    ticks = np.diff(np.round(np.arange(len(frames) + 1) * 100 / fps)).astype(int) * 10
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = comment
    options = {"comment": comment.encode()} if path.suffix.lower() == ".gif" else {"quality": 95, "exif": exif}
    first.save(path, save_all=True, append_images=rest, duration=ticks.tolist(), loop=0, **options)


def _write_png(path: Path, chunks: Iterator[np.ndarray], fps: float, comment: str) -> None:
    text = PngInfo()
    text.add_text("recipe", comment)
    Image.fromarray(np.concatenate(list(chunks))[0]).save(path, pnginfo=text)


def read_comment(path: Path) -> str:
    """Return the comment that `write_video` stored in a file, or ""."""
    if path.suffix.lower() == ".mp4":
        import av

        from sora_jax.data.reading.videos import OPTIONS

        with av.open(f"file:{path}", options=OPTIONS, metadata_errors="replace") as container:
            return container.metadata.get("comment", "")
    with Image.open(path) as image:
        comment = image.info.get("comment") or image.info.get("recipe")
        comment = comment or image.getexif().get(ExifTags.Base.ImageDescription, "")
    return comment.decode(errors="replace") if isinstance(comment, bytes) else str(comment)


WRITERS = {".mp4": _write_mp4, ".gif": _write_animation, ".webp": _write_animation, ".png": _write_png}
