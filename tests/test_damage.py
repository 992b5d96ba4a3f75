"""Damaged files: nothing crashes or hangs, and what is used in part says so."""

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from fixtures_media import encode, flat, names, noise
from PIL import Image

from sora_jax.data.reading.damage import check_units
from sora_jax.data.reading.media import SpanRule, decode
from sora_jax.data.reading.tracks import Damage
from sora_jax.data.viewing.write import write_video

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "bench"))
import corrupt


def test_forbidden_bytes_in_picture_data():
    sound = b"\x00\x00\x00\x06\x65\x01\x00\x00\x03\x01"
    check_units("h264", sound, 4)
    check_units("h264", b"\x00\x00\x00\x06\x06\x01\x00\x00\x01\x01", 4)  # no picture data
    check_units("h264", sound[:7] + b"\x00\x00\x00", 4)  # zeros at the end of a unit
    for unit in (b"\x65\x00\x00\x00\x00\x00\x07", b"\x65\x00\x00\x01\x00\x00\x07", b"\x65"):
        with pytest.raises(Damage):
            check_units("h264", b"\x00\x00\x00\x07" + unit, 4)


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
        assert 6 < len(clip.frames) < 30
        # No length stands in a GIF, and FFmpeg believes the size of the file more than that in the header of an AVI.
        assert ending in ("gif", "avi") or clip.flags[0].startswith("partial: damaged")
        np.testing.assert_array_equal(clip.frames, whole.frames[: len(clip.frames)])


@pytest.mark.parametrize("frames", ["0", "3"])
def test_a_cut_between_packets_costs_only_frames_whose_neighbours_lack(tmp_path, frames):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": frames, "b-pyramid": "none"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for pixels in flat(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        ends = [packet.pos for packet in container.demux(video=0) if packet.size]
    for count in range(20, 29):
        clip = decode(io.BytesIO(path.read_bytes()[: ends[count]]))
        assert names(clip.frames) == names(flat(len(clip.frames)))
        assert count - 2 < len(clip.frames) + (frames == "3") and clip.flags[0].startswith("partial: damaged: it ends")


def test_damage_before_and_after_a_span_is_not_its_concern(tmp_path):
    path = encode(tmp_path / "a.mp4", noise(60), g="10", bf="0")
    data = bytearray(path.read_bytes())
    whole = decode(path).frames
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    before, after = (decode(io.BytesIO(bytes(data)), SpanRule(10, place=place)) for place in (0.0, 1.0))
    assert before.flags == after.flags == ()
    np.testing.assert_array_equal(before.frames, whole[:10])
    np.testing.assert_array_equal(after.frames, whole[-10:])
    part = decode(io.BytesIO(bytes(data)))
    assert 20 <= len(part.frames) < 40 and part.flags[0].startswith("partial: damaged")
    np.testing.assert_array_equal(part.frames, whole[: len(part.frames)])


def test_the_same_damage_is_told_each_time_and_never_of_another_file(tmp_path):
    good = encode(tmp_path / "good.avi", noise(30), codec="mpeg4", pix_fmt="yuv420p", g="1")
    data = bytearray(good.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    flags = [decode(io.BytesIO(bytes(data))).flags for _ in range(3)]
    assert flags[0] and flags[0] == flags[1] == flags[2]
    assert decode(good).flags == ()


def test_damaged_variants_seldom_pass_for_whole(tmp_path):
    """Take formats whose damage can be seen, by check sums or by lengths that must fit."""
    first, *rest = [Image.fromarray(frame) for frame in noise(6)]
    first.save(tmp_path / "b.png", save_all=True, append_images=rest, duration=100)
    paths = [str(encode(tmp_path / f"a.{ending}", noise(12), pix_fmt="yuv420p")) for ending in ("mkv", "mp4")]
    paths.append(str(tmp_path / "b.png"))
    intact = {path: corrupt.read(corrupt.Variant(path)) for path in paths}
    outcomes = corrupt.judge(corrupt.make_variants(paths, 90), intact, 1, 10.0)
    assert sum(text.startswith("SILENT") for text in outcomes) <= 2
    assert not {"crash", "hang"} & set(outcomes)
    assert {"used in part, with a flag", "refused: damaged"} <= set(outcomes)


def test_the_judge_tells_other_pictures():
    """The test above proves nothing with a judge that takes other pictures for the intact ones."""
    clip = corrupt.DecodedClip(noise(3), 10.0)
    other = corrupt.DecodedClip(noise(3)[::-1], 10.0)
    assert corrupt.outcome(clip, clip) == "whole, as the intact one"
    assert corrupt.outcome(other, clip).startswith("SILENT")
    assert corrupt.outcome(corrupt.DecodedClip(noise(3)[:2], 10.0), clip) == "shorter, pictures as intact"
