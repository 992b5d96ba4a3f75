"""Damaged files: nothing crashes or hangs, and what is used in part says so."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures_media import encode, flat, names
from PIL import Image

from sora_jax.data.building.pool import map_with_timeout
from sora_jax.data.reading.damage import check_units
from sora_jax.data.reading.media import SpanRule, decode
from sora_jax.data.reading.tracks import Damage, MediaError
from sora_jax.data.viewing.write import write_video

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "bench"))
import corrupt


def noise(count: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


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
    assert all(
        isinstance(result, str | corrupt.DecodedClip) for result in map_with_timeout(corrupt.read, variants, 1, 10)
    )


def test_no_frames_is_a_media_error(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    with pytest.raises(MediaError, match="no frames"):
        decode(tmp_path / "a.gif")
