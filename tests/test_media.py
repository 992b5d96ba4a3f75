"""Decoding and writing: every clip here is made on the spot, with what real files get wrong."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from fixtures_media import corners, encode, flat, names, noise, quadrants
from PIL import Image

from sora_jax.data.reading import graphs, tracks
from sora_jax.data.reading.media import SpanRule, decode, sample
from sora_jax.data.reading.tracks import MediaError
from sora_jax.data.viewing.sheets import contact_sheet, strip
from sora_jax.data.viewing.write import save_png, write_video
from sora_jax.errors import UserError


@pytest.mark.parametrize("ending", [".mp4", ".gif", ".webp"])
@pytest.mark.parametrize("size", [(48, 64), (31, 45)])
def test_what_is_written_is_read_back(tmp_path, ending, size):
    frames = flat(7, *size)
    clip = decode(write_video(tmp_path / f"clip{ending}", frames, fps=8))
    assert clip.fps == pytest.approx(8, rel=0.05)
    even = tuple(n + n % 2 for n in size) if ending == ".mp4" else size
    assert clip.frames.shape == (7, *even, 3)
    assert names(clip.frames) == names(frames)
    assert np.abs(clip.frames[:, : size[0], : size[1]].astype(int) - frames).mean() < 3


def test_odd_sides_are_padded_with_a_copy_of_the_edge(tmp_path):
    blocks = np.random.default_rng(0).integers(60, 190, (1, 4, 3, 3), dtype=np.uint8)
    frames = blocks.repeat(8, axis=1).repeat(8, axis=2)[:, :31, :23].repeat(3, axis=0)
    read = decode(write_video(tmp_path / "odd.mp4", frames, 8)).frames.astype(int)
    assert np.abs(read[:, 31] - read[:, 30]).max() < 12 and np.abs(read[:, :, 23] - read[:, :, 22]).max() < 12


def test_png_and_upscale_are_exact(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (1, 5, 7, 3), dtype=np.uint8)
    read = decode(write_video(tmp_path / "a.png", frame, 8, upscale=3)).frames
    np.testing.assert_array_equal(read, np.kron(frame, np.ones((1, 3, 3, 1), np.uint8)))
    np.testing.assert_array_equal(decode(save_png(tmp_path / "b.png", frame[0])).frames, frame)


def test_unwritable_clips_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="--out is .*clip.xyz; it must end in .mp4, .gif or .webp"):
        write_video(tmp_path / "clip.xyz", flat(2), 8)
    with pytest.raises(UserError, match="clip.png; it must end in .mp4"):
        write_video(tmp_path / "clip.png", flat(2), 8)
    with pytest.raises(UserError, match="uint8"):
        write_video(tmp_path / "clip.mp4", flat(2).astype(float), 8)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_video(tmp_path / "file" / "clip.mp4", flat(2), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("rotation", "shape"), [(None, (48, 96, 3)), (90, (96, 48, 3))])
def test_pixels_become_square(tmp_path, rotation, shape):
    path = encode(tmp_path / "wide.mp4", quadrants()[None].repeat(3, 0), sar=Fraction(3, 2), rotation=rotation)
    frame = decode(path).frames[0]
    assert frame.shape == shape and corners(frame) == corners(np.rot90(quadrants(), rotation == 90))


def test_frames_and_rate_come_from_time_stamps(tmp_path):
    stamps = [0, 100, 200, 500, 600, 700]  # the third frame stays for 300 ms
    clip = decode(encode(tmp_path / "vfr.mkv", flat(6), stamps))
    assert (clip.fps, names(clip.frames)) == (pytest.approx(10), [0, 1, 2, 2, 2, 3, 4, 5])
    clip = decode(encode(tmp_path / "liar.mkv", flat(12), stamps=np.arange(12) * 40, rate=1000))  # rate of the header
    assert (clip.fps, names(clip.frames)) == (pytest.approx(25), names(flat(12)))


def test_frames_that_are_promised_and_do_not_come_are_not_made_up():
    images = [(k / 10, lambda fit, k=k: flat(6)[k]) for k in range(6)]
    promised = tracks.FrameSource(np.arange(6) / 10, 0.6, lambda start: iter(images[:3]))
    assert names(sample(promised).frames) == [0, 1, 2]
    held = tracks.FrameSource(np.arange(6) / 10, 1.0, lambda start: iter(images))
    assert names(sample(held).frames) == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_fps_and_max_fps(tmp_path):
    path = encode(tmp_path / "fast.mp4", flat(12), rate=20)
    assert names(decode(path, SpanRule(fps=10)).frames) == names(flat(12))[::2]
    assert names(decode(path, SpanRule(max_fps=10)).frames) == names(flat(12))[::2]
    assert decode(path, SpanRule(max_fps=30)).fps == 20
    assert names(decode(path, SpanRule(fps=40)).frames) == [n for n in names(flat(12)) for _ in range(2)]


def test_only_the_part_wanted_is_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "long.mp4", flat(200), rate=10, g="10")
    drawn, render = [], graphs.FrameRenderer.render
    monkeypatch.setattr(graphs.FrameRenderer, "render", lambda *frame: drawn.append(frame) or render(*frame))
    assert len(decode(path, SpanRule(3, place=0.5)).frames) == len(drawn) == 3


def test_ten_bits(tmp_path):
    quiet = {"x265-params": "log-level=0"}
    clip = decode(encode(tmp_path / "deep.mp4", flat(4), codec="libx265", pix_fmt="yuv420p10le", **quiet))
    assert clip.frames.dtype == np.uint8
    assert names(clip.frames) == [0, 1, 2, 3]


def junk() -> dict[str, bytes]:
    png = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(png, "PNG")
    side = (60000).to_bytes(2, "little")
    bomb = b"GIF89a" + side * 2 + b"\x80\0\0" + bytes(6) + b",\0\0\0\0" + side * 2 + b"\0;"
    return {
        "empty.mp4": b"",
        "words.mp4": b"these are words " * 50,
        "pointer.png": b"version https://git-lfs.github.com/spec/v1\n",
        "cut.png": png.getvalue()[:800],
        "bomb.gif": bomb,
        "list.m3u8": b"#EXTM3U\n#EXTINF:10,\n/etc/passwd\n",
        "no_frames.gif": b"GIF89a\1\0\1\0\0\0\0;",
        "list.ffconcat": b"ffconcat version 1.0\nfile missing.mp4\n",
        "call.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        "art.ans": b"\x1b[31mhello\x1b[0m\n" * 30,
    }


@pytest.mark.parametrize("name", sorted(junk()))
def test_junk_is_refused_with_a_reason(tmp_path, name):
    (tmp_path / name).write_bytes(junk()[name])
    text = name.endswith((".ffconcat", ".sdp", ".ans"))  # refused before FFmpeg opens what it names
    with pytest.raises(MediaError, match="^not a picture or a video: a text, or a list" if text else r"\w+: \w+"):
        decode(tmp_path / name)


def test_reasons_are_for_people():
    errors = {
        SyntaxError("broken PNG file"): "broken PNG file",
        KeyError(274): "KeyError, 274",
        MemoryError(): "MemoryError",
    }
    assert [tracks.reason(error) for error in errors] == list(errors.values())


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="no video"):
        decode(tmp_path / "sound.mp4")


def picture(tmp_path, name: str, image: Image.Image, **options) -> np.ndarray:
    image.save(tmp_path / name, **options)
    clip = decode(tmp_path / name)
    assert clip.fps == 1.0
    return clip.frames


def test_transparency_becomes_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:4] = (200, 0, 0, 255)
    pixels[4:] = (0, 0, 0, 0)
    frames = picture(tmp_path, "a.png", Image.fromarray(pixels))
    assert (frames[0, :4] == (200, 0, 0)).all() and (frames[0, 4:] == 255).all()
    palette = Image.fromarray(np.arange(2, dtype=np.uint8).repeat(32).reshape(8, 8), "L").convert("P")
    frames = picture(tmp_path, "p.png", palette, transparency=0)
    assert (frames[0, :4] == 255).all() and (frames[0, 4:] == 1).all()


def test_cmyk_and_sixteen_bits(tmp_path):
    frames = picture(tmp_path, "a.jpg", Image.fromarray(flat(1)[0]).convert("CMYK"), quality=95)
    assert names(frames) == [0]
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    frames = picture(tmp_path, "a.png", Image.fromarray(deep))
    np.testing.assert_array_equal(frames[0, :, :, 0], np.arange(256).reshape(16, 16))
    assert picture(tmp_path, "dark.png", Image.fromarray(np.full((4, 4), 200, np.uint16))).max() == 0


def test_gif_pauses(tmp_path):
    first, *rest = [Image.fromarray(frame) for frame in flat(5)]
    pauses = [100, 100, 300, 100, 100]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest, duration=pauses, loop=0)
    clip = decode(tmp_path / "a.gif")
    assert clip.fps == pytest.approx(10)
    assert names(clip.frames) == [0, 1, 2, 2, 2, 3, 4]


def test_fit_scales_to_cover_and_crops_evenly(tmp_path):
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:, 20:60] = 255  # the middle square
    save_png(tmp_path / "a.png", frame)
    read = decode(tmp_path / "a.png", fit=lambda height, width, frames: (20, 20)).frames[0]
    assert read.shape == (20, 20, 3)
    assert (read > 127).all() and (read[:, 2:-2] > 250).all()


def test_contact_sheet_takes_mixed_sizes():
    clips = [flat(5, 20, 30), flat(1, 40, 10), flat(9, 16, 16)]
    words = ["a long caption " * 20, "x" * 300, ""]
    sheet = contact_sheet(clips, words, columns=2, scale=2)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3
    assert (sheet[6, 6] == clips[0][0, 0, 0]).all()  # the first strip stands in the first corner
    short = contact_sheet(clips, ["", "", ""], columns=2, scale=2)
    assert sheet.shape[0] > short.shape[0] and sheet.shape[1] == short.shape[1]


def test_a_sheet_without_columns_leaves_little_white():
    """Forty narrow cells among four wide ones: a column as wide as the widest would leave most of the sheet white."""
    clips = [np.zeros((4, 100, 100, 3), np.uint8)] * 4 + [np.zeros((1, 100, 160, 3), np.uint8)] * 40
    sheets = {columns: contact_sheet(clips, ["a"] * 44, columns, 1) for columns in (2, None)}
    white = {columns: (sheet == 255).all(-1).mean() for columns, sheet in sheets.items()}
    assert white[2] > 0.6 and white[None] < 0.5
    assert sheets[None].shape[1] <= 1200
    drawn = {columns: (sheet < 255).all(-1).sum() for columns, sheet in sheets.items()}
    assert drawn[2] == drawn[None]  # nothing is left out or covered


def test_a_row_of_a_sheet_holds_cells_of_about_one_height():
    low, high = np.zeros((1, 20, 160, 3), np.uint8), np.zeros((1, 200, 160, 3), np.uint8)
    sheet = contact_sheet([low, high, low, high], [""] * 4, None)
    assert sheet.shape[0] < 2 * 230 and sheet.shape[1] < 400  # two rows of two


def test_strip_shows_first_and_last():
    tiles = strip(flat(6, 8, 8), shown=3)
    assert tiles.shape == (8, 3 * 8 + 2 * 2, 3)
    assert names(np.stack([tiles[:, :8], tiles[:, -8:]])) == [0, 5]
