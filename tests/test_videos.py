"""Check how a video is shown: display matrix, fields, depth, time stamps, cuts; small clips with known right frames."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from fixtures_media import corners, encode, flat, quadrants

from sora_jax.data.reading import videos
from sora_jax.data.reading.media import SpanRule, decode
from sora_jax.data.reading.tracks import MediaError

DATA = Path(__file__).parent / "data" / "videos"
OPEN_GOP = {"x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"}


def ramp(count: int, step: int = 10) -> np.ndarray:
    """Frame k has grey 10 + step * k."""
    return np.stack([np.full((48, 64, 3), 10 + step * k, np.uint8) for k in range(count)])


def steps(frames: np.ndarray, step: int = 10) -> list[int]:
    return ((frames.mean((1, 2, 3)) - 10) / step).round().astype(int).tolist()


def plain(path, frames: np.ndarray, codec: str = "libx264", rate: int = 8, **options):
    """Write frames without time stamps of their own, as encoders of cameras do."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def displayed(frame: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """The frame after x' = a x + c y, y' = b x + d y, moved back to the origin."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]]
    to_x, to_y = a * x + c * y, b * x + d * y
    to_x, to_y = to_x - to_x.min(), to_y - to_y.min()
    result = np.empty((to_y.max() + 1, to_x.max() + 1, 3), np.uint8)
    result[to_y, to_x] = frame
    return result


MATRICES = [(1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1), (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0)]


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "mpeg4"])
@pytest.mark.parametrize("matrix", [*MATRICES, (0, -1, -1, 0)])
def test_turns_and_mirrors(tmp_path, codec, matrix):
    quick = {"deadline": "realtime", "cpu-used": "8"} if "vpx" in codec else {}
    path = encode(tmp_path / "a.mp4", quadrants()[None].repeat(3, 0), codec=codec, pix_fmt="yuv420p", **quick)
    data = path.read_bytes()
    one = (65536).to_bytes(4)
    place = data.index(one + bytes(12) + one, data.index(b"tkhd"))  # [a b u; c d v; x y w] of the header (ISO 14496-12)
    a, b, c, d = ((65536 * value).to_bytes(4, signed=True) for value in matrix)
    frame = decode(io.BytesIO(data[:place] + a + b + bytes(4) + c + d + data[place + 20 :])).frames[0]
    expected = displayed(quadrants(), *matrix)
    assert frame.shape == expected.shape and corners(frame) == corners(expected)


@pytest.mark.parametrize(("rotation", "turned"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_in_matroska(tmp_path, rotation, turned):
    frames = quadrants()[None].repeat(3, 0)
    options = dict(codec="libvpx-vp9", pix_fmt="yuv420p", deadline="realtime")
    path = encode(tmp_path / "a.mkv", frames, rotation=rotation, **options)
    assert corners(decode(path).frames[0]) == corners(np.rot90(quadrants(), turned))


def test_hdr_is_the_same_in_hevc_vp9_and_av1(tmp_path):
    hevc = decode(DATA / "hevc_pq.mp4").frames.astype(int)
    with av.open(str(DATA / "hevc_pq.mp4")) as source, av.open(str(tmp_path / "a.mp4"), "w") as target:
        stream = target.add_stream("libsvtav1", rate=8, options={"crf": "5", "preset": "12", "svtav1-params": "tune=0"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_trc, context.color_primaries = 9, 16, 9
        for frame in source.decode(video=0):
            frame.pict_type = 0
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    for path in (DATA / "vp9_pq.webm", tmp_path / "a.mp4"):
        assert np.abs(decode(path).frames.astype(int) - hevc)[:, :, [8, 48, 88]].max() <= 2
    assert np.ptp(hevc[0, 32, [8, 48, 88]]) > 50


def test_vp9_of_ten_bits():
    frame = decode(DATA / "vp9_10bit.webm").frames[0].astype(int)
    quarters = frame[[12, 12, 36, 36], [16, 48, 16, 48]]
    assert np.abs(quarters - [(220, 30, 30), (30, 200, 30), (30, 30, 220), (220, 220, 30)]).max() <= 6


def test_chroma_stands_left_of_the_middle(tmp_path):
    """H.264's chroma samples stand on the even columns of luma (ITU-T H.264, figure E-1, type 0)."""
    column = np.arange(64)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        frame = av.VideoFrame(64, 32, "yuv420p")
        rows = 0 * column + 100, 2 * column[::2] + 64, 0 * column[::2] + 128
        for plane, row in zip(frame.planes, rows, strict=True):
            padded = np.zeros((plane.height, plane.line_size), np.uint8)
            padded[:, : plane.width] = row
            plane.update(padded.tobytes())
        container.mux([*stream.encode(frame), *stream.encode()])
    blue = decode(tmp_path / "a.mkv").frames[0, 16, 10:50, 2].astype(int)
    expected = 1.1644 * (100 - 16) + 2.0172 * (2 * column[10:50] + 64 - 128)  # BT.601
    assert np.abs(blue - expected.clip(0, 255)).max() <= 2


def fields(count: int) -> np.ndarray:
    """A white bar that moves by 4 pixels a frame, filmed by fields: the lower one later, 2 pixels further on."""
    frames = np.zeros((count, 48, 160, 3), np.uint8)
    for k in range(count):
        frames[k, ::2, 4 * k : 4 * k + 8] = frames[k, 1::2, 4 * k + 2 : 4 * k + 10] = 255
    return frames


def test_interlaced_frames_are_deinterlaced(tmp_path):
    options = dict(rate=10, pix_fmt="yuv420p", g="6", bf="0")
    path = encode(tmp_path / "a.mp4", fields(36), **options, **{"x264-params": "tff=1"})
    clip = decode(path)
    luma = clip.frames.astype(float).mean(3)
    assert clip.flags == ("deinterlaced",) and len(luma) == 36
    assert np.abs(luma[:, 1:-1] - (luma[:, 2:] + luma[:, :-2]) / 2).mean() < 0.3
    left = np.array([np.flatnonzero(frame[24] > 127)[0] for frame in luma])
    assert (np.diff(left) == 4).all()
    for number in range(6):  # wherever decoding begins
        span = decode(path, SpanRule(3, number=number, count=6))
        first = round(span.start * 10)
        np.testing.assert_array_equal(span.frames, clip.frames[first : first + 3])
    combed = decode(encode(tmp_path / "b.mp4", fields(8), **options))  # not marked, so left as it is
    assert combed.flags == () and np.abs(np.diff(combed.frames[4].astype(int), axis=0)).mean() > 5


def test_b_frames_in_avi(tmp_path):
    path = plain(tmp_path / "a.avi", ramp(21), bf="3")
    with av.open(str(path)) as container:  # the container has no stamps but those of coding order
        assert np.all(np.diff([packet.pts for packet in container.demux(video=0) if packet.size]) > 0)
    clip = decode(path)
    assert (steps(clip.frames), clip.fps, clip.flags) == (list(range(21)), 8.0, ())
    assert steps(decode(path, SpanRule(5, place=1.0)).frames) == list(range(16, 21))


def test_streams_without_time_stamps_are_flagged(tmp_path):
    clip = decode(plain(tmp_path / "a.h264", ramp(20), bf="2"))
    assert steps(clip.frames) == list(range(20)) and clip.flags[0].startswith("times: ")
    with av.open(str(tmp_path / "b.mkv"), "w") as container:
        stream = container.add_stream("mjpeg", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        for pixels in ramp(20):
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                packet.pts = packet.dts = 0
                container.mux(packet)
    clip = decode(tmp_path / "b.mkv")
    assert steps(clip.frames) == list(range(20)) and clip.flags[0].startswith("times: ")


def test_a_cut_at_an_open_gop_costs_nothing():
    clip = decode(DATA / "cut_open_gop.mkv")  # FFmpeg: mmco: unref short failure
    assert steps(clip.frames) == [*range(23, -1, -1), *range(24)] and clip.flags == ()


def test_the_film_goes_on_after_a_join_of_open_gops(tmp_path):
    """Two such files by `ffmpeg -f concat -c copy`: FFmpeg gives no picture for some frames, which is flagged."""
    with av.open(str(tmp_path / "a.mkv"), "w") as target:
        for repeat in range(2):
            with av.open(str(DATA / "cut_open_gop.mkv")) as source:
                if not repeat:
                    stream = target.add_stream_from_template(source.streams.video[0])
                packets = [packet for packet in source.demux(video=0) if packet.size and packet.pts is not None]
                for packet, dts in zip(packets, sorted(packet.pts for packet in packets), strict=True):
                    later = 6000 * repeat
                    packet.pts, packet.dts, packet.stream = packet.pts + later, dts - 250 + later, stream
                    target.mux(packet)
    clip = decode(tmp_path / "a.mkv")
    shown = steps(clip.frames)
    assert len(shown) == 96 and clip.flags == (videos.HELD,)
    assert shown[:46] == [*range(23, -1, -1), *range(22)] and shown[-32:] == [*range(7, -1, -1), *range(24)]


@pytest.mark.parametrize("packets", [9, 25, 37.3])
def test_a_recording_that_begins_in_mid_film_begins_at_its_first_key_frame(tmp_path, packets):
    path = encode(tmp_path / "a.ts", ramp(72, 3), rate=25, pix_fmt="yuv420p", **OPEN_GOP)
    whole = decode(path)
    assert steps(whole.frames, 3) == list(range(72)) and whole.flags == ()
    clip = decode(io.BytesIO(path.read_bytes()[int(188 * packets) :]))
    first = 72 - len(clip.frames)
    assert first and first % 12 == 0 and clip.flags[0].startswith("start: ")
    np.testing.assert_array_equal(clip.frames, whole.frames[first:])


def test_oddities_beside_the_pictures_cost_nothing(tmp_path):
    path = encode(tmp_path / "a.ts", ramp(72, 3), rate=25, pix_fmt="yuv420p", g="12")
    data = bytearray(path.read_bytes())
    for place in range(188 * 30, len(data), 188):
        data[place + 3] = data[place + 3] & 0xF0 | (data[place + 3] + 5) & 15  # the continuity counter jumps
    clip = decode(io.BytesIO(bytes(data)))
    assert steps(clip.frames, 3) == list(range(72)) and clip.flags == ()
    with av.open(str(tmp_path / "b.mp4"), "w") as container:
        picture, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=44100)
        picture.height, picture.width, picture.pix_fmt = 48, 64, "yuv420p"
        noise = np.random.default_rng(0).uniform(-1, 1, (1, 8192)).astype(np.float32)
        samples = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
        samples.sample_rate = 44100
        heard = [*sound.encode(samples), *sound.encode()]
        coded = [bytes(packet) for packet in heard]
        for pixels in ramp(20):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux([*heard, *picture.encode()])
    data = (tmp_path / "b.mp4").read_bytes()
    for sounds in coded:
        assert data.count(sounds) == 1
        data = data.replace(sounds, b"\xff" * len(sounds))
    clip = decode(io.BytesIO(data))
    assert steps(clip.frames) == list(range(20)) and clip.flags == ()


KINDS = [(ending, codec) for ending in ("mp4", "mkv") for codec in ("libx264", "libvpx-vp9", "mpeg4")]


@pytest.mark.parametrize(("ending", "codec"), [*KINDS, ("webm", "libvpx-vp9")])
def test_a_late_start_and_a_last_frame_that_stands_still_are_no_damage(tmp_path, ending, codec):
    for still in (100, 8000):
        with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
            stream, packets = container.add_stream(codec, rate=10), []
            stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
            stream.codec_context.time_base = Fraction(1, 1000)
            for k, pixels in enumerate(ramp(21)):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = 3000 + 100 * k, Fraction(1, 1000)
                packets += stream.encode(frame)
            packets += stream.encode()
            packets[-1].duration = still
            container.mux(packets)
        clip = decode(tmp_path / f"a.{ending}")
        assert steps(clip.frames) == list(range(21)) and clip.flags == ()


def test_a_codec_without_a_decoder_is_refused_with_a_sentence(tmp_path):
    data = encode(tmp_path / "a.mp4", flat(3)).read_bytes().replace(b"avc1", b"zzzz")
    with pytest.raises(MediaError, match="no decoder: FFmpeg has none for the codec"):
        decode(io.BytesIO(data))
