"""Damaged files: nothing crashes or hangs, and what is used in part says so."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_media import encode, flat, names
from PIL import Image

from sora_jax.data.building.pool import map_with_timeout
from sora_jax.data.reading.damage import (
    check_gif,
    check_units,
    lzw_length,
    signs_of_damage,
    sound_jpeg,
    sound_png_frames,
)
from sora_jax.data.reading.media import SpanRule, decode
from sora_jax.data.reading.tracks import Damage, MediaError
from sora_jax.data.viewing.write import write_video

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "bench"))
import corrupt


def noise(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def lzw(symbols: list[int], bits: int) -> bytes:
    """GIF's LZW by the book (GIF89a, appendix F), one code at a time."""
    clear, text, size = 1 << bits, "", bits + 1
    codes, table, run = [clear], {(n,): n for n in range(1 << bits)}, ()
    widths = [size]
    free = clear + 2

    def emit(code):
        codes.append(code)
        widths.append(size)

    for symbol in symbols:
        if (*run, symbol) in table:
            run = (*run, symbol)
            continue
        emit(table[run])
        if free < 4096:
            table[(*run, symbol)] = free
            size = max(size, min(12, free.bit_length()))
            free += 1
        run = (symbol,)
    emit(table[run])
    if free < 4096:
        size = min(12, max(size, free.bit_length()))
    emit(clear + 1)
    text = "".join(format(code, f"0{width}b")[::-1] for code, width in zip(codes, widths, strict=True))
    text += "0" * (-len(text) % 8)
    return bytes(int(text[i : i + 8][::-1], 2) for i in range(0, len(text), 8))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 5000, 40000])
@pytest.mark.parametrize("bits", [2, 8])
def test_lzw_length_counts_what_was_coded(count, bits):
    for symbols in (np.zeros(count, int), np.random.default_rng(0).integers(0, 1 << bits, count)):
        data = lzw(symbols.tolist(), bits)
        assert lzw_length(data, bits) == count
        if count > 10:
            assert lzw_length(data[: len(data) // 2], bits) < count


def test_pillow_s_gifs_are_sound_and_a_flipped_byte_is_found():
    buffer = io.BytesIO()
    first, *rest = [Image.fromarray(frame) for frame in noise(3)]
    first.save(buffer, "GIF", save_all=True, append_images=rest)
    data = buffer.getvalue()
    check_gif(data)
    found = 0
    for place in range(1200, 2200, 50):
        changed = bytearray(data)
        changed[place] ^= 0x55
        try:
            check_gif(bytes(changed))
        except Damage:
            found += 1
    assert found >= 18


def test_png_sums():
    buffer = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    assert sound_png_frames(io.BytesIO(data)) == (float("inf"), "")
    data[len(data) // 2] ^= 1
    assert sound_png_frames(io.BytesIO(data)) == (0, "wrong check sum of chunk IDAT")


def test_a_damaged_animated_png_ends_before_the_damage(tmp_path):
    first, *rest = [Image.fromarray(frame) for frame in noise(6)]
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=100)
    data = bytearray((tmp_path / "a.png").read_bytes())
    whole = decode(tmp_path / "a.png").frames
    fourth = [match.start() for match in re.finditer(b"fcTL", data)][4]
    data[fourth - 9] ^= 1  # in the check sum of the chunk before, which holds the fourth frame
    assert sound_png_frames(io.BytesIO(data)) == (3, "wrong check sum of chunk fdAT")
    clip = decode(io.BytesIO(bytes(data)))
    np.testing.assert_array_equal(clip.frames, whole[:3])
    assert "check sum" in clip.flags[0]


def test_jpeg_errors_of_which_pillow_only_warns():
    buffer = io.BytesIO()
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3).astype(np.uint8)
    Image.fromarray(smooth).save(buffer, "JPEG", quality=95)
    data = buffer.getvalue()
    assert sound_jpeg(io.BytesIO(data)) == (1, "")
    start = data.index(b"\xff\xda") + 60
    sound, reason = sound_jpeg(io.BytesIO(data[:start] + b"\xff\x11" * 40 + data[start + 80 :]))
    assert sound == 0 and reason


def test_forbidden_bytes_in_picture_data():
    sound = b"\x00\x00\x00\x06\x65\x01\x00\x00\x03\x01"
    check_units("h264", sound, 4)
    check_units("h264", b"\x00\x00\x00\x06\x06\x01\x00\x00\x01\x01", 4)  # no picture data
    with pytest.raises(Damage):
        check_units("h264", sound[:7] + b"\x00\x00\x00", 4)
        check_units("h264", b"\x00\x00\x00\x07\x65\x00\x00\x00\x00\x00\x07", 4)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "webm", "gif", "avi"])
def test_a_file_without_its_end_gives_its_beginning(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    codecs = {"mkv": "libx264", "webm": "libvpx-vp9", "avi": "mpeg4"}
    if ending in codecs:
        even = {} if ending == "webm" else dict(qmin="3", qmax="3")
        encode(path, noise(30), codec=codecs[ending], pix_fmt="yuv420p", g="1", **even)
    else:
        write_video(path, noise(30), 10)
    whole, data = decode(path), path.read_bytes()
    for share in (0.5, 0.6, 0.7):
        clip = decode(io.BytesIO(data[: int(share * len(data))]))
        assert 6 < len(clip.frames) < 30 and clip.flags[0].startswith("partial: damaged")
        np.testing.assert_array_equal(clip.frames, whole.frames[: len(clip.frames)])


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9])
def test_check_sums_of_matroska(tmp_path, place):
    path = encode(tmp_path / "a.mkv", noise(30), g="1", pix_fmt="yuv420p", cluster_time_limit="500")
    whole, data = decode(path), bytearray(path.read_bytes())
    assert signs_of_damage(path, "matroska,webm") == (float("inf"), "") and not whole.flags
    data[int(place * len(data))] ^= 1
    limit, damage = signs_of_damage(io.BytesIO(bytes(data)), "matroska,webm")
    assert limit <= place * len(data) and "check sum" in damage


def test_damage_before_and_after_a_span_is_not_its_concern(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(60), g="10", bf="0")
    data = bytearray(path.read_bytes())
    whole = decode(path).frames
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    before, after = (decode(io.BytesIO(bytes(data)), SpanRule(10, place=place)) for place in (0.0, 1.0))
    assert before.flags == after.flags == ()
    np.testing.assert_array_equal(before.frames, whole[:10])
    np.testing.assert_array_equal(after.frames, whole[-10:])
    assert "damaged" in decode(io.BytesIO(bytes(data))).flags[0]


def test_the_same_damage_is_told_each_time_and_never_of_another_file(tmp_path):
    good = encode(tmp_path / "good.avi", noise(30), codec="mpeg4", pix_fmt="yuv420p", g="1")
    data = bytearray(good.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    flags = [decode(io.BytesIO(bytes(data))).flags for _ in range(3)]
    assert flags[0] and flags[0] == flags[1] == flags[2]
    assert decode(good).flags == ()


def small_clips(folder: Path) -> list[str]:
    """Clips of formats whose damage can be seen, by check sums or by lengths that must fit."""
    paths = [encode(folder / "a.mkv", noise(), pix_fmt="yuv420p"), write_video(folder / "a.gif", noise(), 10)]
    first, *rest = [Image.fromarray(frame) for frame in noise(6)]
    first.save(folder / "b.png", save_all=True, append_images=rest, duration=100)
    return [str(path) for path in (*paths, folder / "b.png")]


def test_damaged_variants_never_pass_for_whole(tmp_path):
    paths = small_clips(tmp_path)
    intact = {path: corrupt.read(corrupt.Variant(path)) for path in paths}
    outcomes = corrupt.judge(corrupt.make_variants(paths, 60), intact, 1, 10.0)
    assert not [text for text in outcomes if text.startswith(("SILENT", "crash", "hang"))]
    assert {"used in part, with a flag", "refused: damaged"} <= set(outcomes)


def test_the_judge_tells_other_pictures():
    """The test above proves nothing with a judge that takes other pictures for the intact ones."""
    clip = corrupt.DecodedClip(noise(3), 10.0)
    other = corrupt.DecodedClip(noise(3)[::-1], 10.0)
    assert corrupt.outcome(clip, clip) == "whole, as the intact one"
    assert corrupt.outcome(other, clip).startswith("SILENT")
    assert corrupt.outcome(corrupt.DecodedClip(noise(3)[:2], 10.0), clip) == "shorter, pictures as intact"


def test_names_are_kept_by_a_sound_file(tmp_path):
    """A sound file with B-frames and several reference frames raises no alarm in any of the ways of reading it."""
    path = encode(tmp_path / "a.mkv", flat(24), refs="4", bf="4")
    clip = decode(path)
    assert names(clip.frames) == names(flat(24)) and clip.flags == ()


def test_a_process_reads_damaged_files_without_dying(tmp_path):
    path = str(encode(tmp_path / "a.mp4", noise(4)))
    variants = [corrupt.Variant(path, "zeros", seed) for seed in range(6)]
    results = map_with_timeout(corrupt.read, variants, 1, 10)
    assert all(isinstance(result, str | corrupt.DecodedClip) for result in results)


def test_no_frames_is_a_media_error(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    with pytest.raises(MediaError, match="no frames"):
        decode(tmp_path / "a.gif")
