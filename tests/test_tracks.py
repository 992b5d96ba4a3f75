"""Spans anywhere in a file, however it is read; colours by tag; scaling against Pillow."""

import io
import os
from fractions import Fraction

import av
import numpy as np
import pytest
from fixtures_media import encode, flat
from PIL import Image

from sora_jax.data.reading import videos
from sora_jax.data.reading.media import SpanRule, decode, sample_frames
from sora_jax.data.reading.tracks import MediaError, usual_period


def moving(count: int = 120, height: int = 48, width: int = 64) -> np.ndarray:
    """Every frame differs from every other."""
    random = np.random.default_rng(0)
    return random.integers(40, 200, (count, height // 8, width // 8, 3), np.uint8).repeat(8, 1).repeat(8, 2)


KINDS = {
    "mp4": dict(bf="3", refs="4"),
    "open.mkv": {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"},
    "open.ts": {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"},
    "webm": dict(codec="libvpx-vp9", deadline="realtime", **{"cpu-used": "8"}),
    "avi": dict(codec="mpeg4"),
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_span_is_a_part_of_the_whole(tmp_path, kind):
    path = encode(tmp_path / f"a.{kind}", moving(), **({"pix_fmt": "yuv420p"} | dict(g="12") | KINDS[kind]))
    whole = decode(path)
    assert len(whole.frames) == 120 and whole.start == 0 and not whole.flags
    for number in range(4):
        span = decode(path, SpanRule(7, place=0.5, number=number, count=4))
        first = round(span.start * whole.fps)
        assert 30 * number <= first <= 30 * number + 23 and not span.flags
        np.testing.assert_array_equal(span.frames, whole.frames[first : first + 7])
    assert decode(path, SpanRule(7, number=4, count=4)) is None


def test_time_stamps_are_read_once_for_all_spans(tmp_path, monkeypatch):
    path, read, calls = encode(tmp_path / "a.mp4", flat(60)), videos._read_index, []
    monkeypatch.setattr(videos, "_read_index", lambda *given: calls.append(given) or read(*given))
    for number in range(3):
        decode(path, SpanRule(5, number=number, count=3))
    assert len(calls) == 1
    os.utime(path, ns=(1, 1))  # another file of the same name and size
    decode(path)
    assert len(calls) == 2


@pytest.mark.parametrize(("frames", "count", "spans"), [(20, 1, 1), (20, 9, 4), (4, 3, 1), (12, 2, 2)])
def test_stretches_are_equal_and_spans_lie_in_them_by_place(frames, count, spans):
    clip = np.arange(frames, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    for place in (0.0, 0.5, 1.0):
        for number in range(spans):
            low, high = number * frames // spans, (number + 1) * frames // spans
            span = sample_frames(clip, 10, SpanRule(5, place=place, number=number, count=count))
            length = min(5, high - low)
            first = low + round(place * (high - low - length))
            assert span.frames[:, 0, 0, 0].tolist() == list(range(first, first + length))
            assert span.start == pytest.approx(first / 10)
        assert sample_frames(clip, 10, SpanRule(5, number=spans, count=count)) is None


def test_frames_in_memory_follow_the_same_rules_as_a_file(tmp_path):
    path, fit = encode(tmp_path / "a.mkv", moving(30), codec="ffv1", pix_fmt="bgr0"), lambda *size: (24, 32)
    for rule in (SpanRule(fps=4), SpanRule(max_fps=5), SpanRule(8, place=1.0), SpanRule(4, number=2, count=3)):
        memory, file = sample_frames(moving(30), 10, rule, fit), decode(path, rule, fit)
        assert memory.fps == file.fps and memory.start == file.start
        assert np.abs(memory.frames.astype(int) - file.frames).mean() < 3


def test_a_file_object_gives_the_same_as_its_path(tmp_path):
    path = encode(tmp_path / "a.webm", moving(30), codec="libvpx", pix_fmt="yuv420p")
    rule = SpanRule(5, place=0.7)
    np.testing.assert_array_equal(decode(io.BytesIO(path.read_bytes()), rule).frames, decode(path, rule).frames)


def test_absurd_time_stamps_do_not_fill_the_memory(tmp_path):
    path = encode(tmp_path / "gap.mkv", flat(4), stamps=[0, 10, 20, 4 * 10**12], bf="0")
    with pytest.raises(MediaError, match="too large"):
        decode(path)


@pytest.mark.parametrize("rate", [24000 / 1001, 30000 / 1001, 60000 / 1001, 15000 / 1001, 12.5, 1 / 3600])
def test_the_rate_has_three_decimals_and_is_never_nought(rate):
    fps = sample_frames(flat(3), rate).fps
    assert fps == round(rate, 3) if rate > 1 else fps == pytest.approx(rate, rel=1e-5)


def test_usual_period_is_unmoved_by_jitter_and_pauses():
    times = np.cumsum([0.0, 0.033, 0.034, 0.033, 0.034, 5.0, 0.033])
    assert usual_period(times, 6.0) == pytest.approx(np.mean([0.033, 0.034, 0.033, 0.034, 0.033]))


# Kr and Kb of the matrices, by the number of their tag (ITU-T H.273, table 4).
WEIGHTS = {1: (0.2126, 0.0722), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 10: (0.2627, 0.0593)}
# x and y of red, green and blue (ITU-T H.273, table 2); white is D65.
BT709 = (0.64, 0.33), (0.30, 0.60), (0.15, 0.06)
WIDE = {9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)), 12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))}
WORDS = [(230, 40, 40), (40, 200, 60), (50, 70, 230), (128, 128, 128), (250, 250, 250)]


def planes(colour, kr: float, kb: float, full: bool) -> list[int]:
    """Luma and chroma of an RGB colour, by the defining equations (ITU-T H.273, 8.3)."""
    red, green, blue = np.array(colour) / 255
    luma = kr * red + (1 - kr - kb) * green + kb * blue
    chroma = (blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))
    scaled = [16 + 219 * luma, *(128 + 224 * c for c in chroma)]
    return [round(v) for v in ([255 * luma, *(128 + 255 * c for c in chroma)] if full else scaled)]


def to_xyz(primaries) -> np.ndarray:
    """The matrix from linear RGB of these primaries to XYZ, white to D65."""
    columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in primaries]).T
    return columns * np.linalg.solve(columns, (0.3127 / 0.3290, 1, (1 - 0.3127 - 0.3290) / 0.3290))


def in_wide(colour, primaries: int) -> np.ndarray:
    """The colour of sRGB in other primaries, by the same curve."""
    code = np.array(colour) / 255
    light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    light = np.linalg.solve(to_xyz(WIDE[primaries]), to_xyz(BT709) @ light)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


TAGS = [(1, 1), (6, 1), (9, 1), (10, 1), (2, 1), (9, 9), (1, 12)]  # of the matrix, of the primaries
SMALL = [(tag, primaries, (32, 48)) for tag, primaries in TAGS]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("tag", "primaries", "size"), [*SMALL, (2, 1, (32, 1280))])
def test_colours_by_tag(tmp_path, tag, primaries, size, full):
    kr, kb = WEIGHTS[{2: 1 if size[1] == 1280 else 6}.get(tag, tag)]
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.options = *size, "yuv420p", {"qp": "0"}
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, 1 + full
        stream.codec_context.color_primaries = primaries
        for k, colour in enumerate(WORDS):
            frame = av.VideoFrame(size[1], size[0], "yuv420p")
            coded = in_wide(colour, primaries) if primaries in WIDE else colour
            for plane, value in zip(frame.planes, planes(coded, kr, kb, full), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.pts, frame.time_base, frame.colorspace, frame.color_range = k, Fraction(1, 10), tag, 1 + full
            frame.color_primaries = primaries
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for fit in (None, lambda height, width, frames: (16, 16)):
        read = decode(tmp_path / "a.mkv", fit=fit).frames[:, 8, 8].astype(int)
        assert np.abs(read - WORDS).max() <= (4 if primaries in WIDE else 2)


def smooth(height: int, width: int) -> np.ndarray:
    """A zone plate: finer and finer rings, which alias where a filter is missing."""
    y, x = np.mgrid[:height, :width]
    rings = 127.5 + 100 * np.cos(((y - height / 2) ** 2 + (x - width / 2) ** 2) * np.pi / 1.2 / width)
    return np.stack([rings, 255 - rings, rings], 2).astype(np.uint8)


@pytest.mark.parametrize(("codec", "pix_fmt"), [("libx264", "yuv444p"), ("ffv1", "bgr0")])
def test_scaling_is_as_good_as_pillow(tmp_path, codec, pix_fmt):
    frame, options = smooth(240, 320), dict(crf="0") if codec == "libx264" else {}
    path = encode(tmp_path / "a.mkv", frame[None].repeat(2, 0), codec=codec, pix_fmt=pix_fmt, **options)
    read = decode(path, fit=lambda height, width, frames: (90, 120)).frames[0]
    expected = np.asarray(Image.fromarray(frame).resize((120, 90), Image.Resampling.LANCZOS))
    error = ((read.astype(float) - expected) ** 2).mean()
    assert 10 * np.log10(255**2 / error) > 32
    nearest = np.asarray(Image.fromarray(frame).resize((120, 90), Image.Resampling.NEAREST))
    assert error < ((nearest.astype(float) - expected) ** 2).mean() / 20


def test_crop_is_centred(tmp_path):
    frame = np.zeros((60, 100, 3), np.uint8)
    frame[:, 45:55] = 255
    path = encode(tmp_path / "a.mp4", frame[None].repeat(2, 0), crf="0")
    read = decode(path, fit=lambda height, width, frames: (30, 30)).frames[0].astype(int)
    np.testing.assert_allclose(read[15], read[15][::-1], atol=4)
    assert read[15, 15].min() > 240 and read[15, 9].max() < 40


def test_a_transparent_video_lies_on_white(tmp_path):
    pixels = np.zeros((4, 32, 32, 4), np.uint8)
    pixels[:, :, :16] = (200, 0, 0, 255)
    with av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuva420p"
        stream.options = {"auto-alt-ref": "0", "cpu-used": "8", "crf": "4"}
        for rgba in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode())
    for fit in (None, lambda height, width, frames: (16, 16)):
        read = decode(tmp_path / "a.webm", fit=fit).frames.astype(int)
        side = read.shape[1] // 4
        assert np.abs(read[:, side, side] - (200, 0, 0)).max() < 16 and read[:, side, -side].min() > 240
    data = (tmp_path / "a.webm").read_bytes()
    with av.open(str(tmp_path / "a.webm")) as container:
        first = next(bytes(packet) for packet in container.demux(video=0))
    with pytest.raises(MediaError, match="^damaged: "):
        decode(io.BytesIO(data.replace(first, bytes(len(first)))))
