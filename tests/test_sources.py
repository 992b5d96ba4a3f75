"""Sources: folders, sidecar captions, zip files, strips, the world; and the rules of size and length."""

import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.data.fit import FitError, SizeRule, crop_box, fit_length, fit_size, pad_frames
from sora_jax.data.media import save_png, write_video
from sora_jax.data.sources import Clip, FolderSource, WorldSource
from sora_jax.data.tracks import MediaError
from sora_jax.data.world import WorldConfig, clip, split
from sora_jax.errors import UserError

lengths = st.integers(1, 300)
factors = st.integers(1, 16)
sides = st.integers(1, 500)


def frame(shade: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def reasons(source: FolderSource) -> dict[str, str]:
    return dict(source.refused)


@given(lengths, factors, lengths)
def test_cut_is_the_longest_allowed_length(frames, factor, most):
    allowed = [n for n in range(1, 301) if (n - 1) % factor == 0 and n <= min(frames, most)]
    assert fit_length(frames, factor, most, "cut") == max(allowed)


@given(lengths, factors, lengths)
def test_pad_loses_no_frame_below_the_limit(frames, factor, most):
    allowed = [n for n in range(1, 400) if (n - 1) % factor == 0 and n <= most]
    enough = [n for n in allowed if n >= frames]
    assert fit_length(frames, factor, most, "pad") == (min(enough) if enough else max(allowed))


def test_lengths_of_eight_sprite_frames():
    assert [fit_length(8, 4, rule=rule) for rule in ("cut", "pad")] == [5, 9]
    assert [fit_length(8, 7, rule=rule) for rule in ("cut", "pad")] == [8, 8]


@given(sides, sides, st.integers(1, 32), st.integers(64, 300))
def test_sizes_are_allowed_and_near_the_native_ratio(height, width, multiple, root):
    limit = max(root, multiple) ** 2
    try:
        new_height, new_width = fit_size(height, width, multiple, limit)
    except FitError:
        shrink = min(1, (limit / (height * width)) ** 0.5)
        assert min(height, width) < multiple or shrink * min(height, width) < multiple
        return
    assert new_height % multiple == new_width % multiple == 0
    assert 0 < new_height <= height and 0 < new_width <= width and new_height * new_width <= limit


@given(sides, sides, sides, sides)
def test_the_crop_is_centred_inside_and_not_squashed(height, width, new_height, new_width):
    left, top, right, bottom = crop_box(height, width, new_height, new_width)
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height
    np.testing.assert_allclose((left + right, top + bottom), (width, height), rtol=1e-9)
    np.testing.assert_allclose((right - left) * new_height, (bottom - top) * new_width, rtol=1e-6)
    assert min(left, top) == pytest.approx(0, abs=1e-9)  # one axis is kept whole


def test_size_rule_refuses_the_impossible():
    with pytest.raises(UserError, match="max_pixels=100"):
        SizeRule(multiple=16, max_pixels=100)
    with pytest.raises(FitError, match="1x1"):
        SizeRule(16)(1, 1)


def test_padding_repeats_the_last_frame():
    frames = np.stack([frame(0), frame(9)])
    np.testing.assert_array_equal(pad_frames(frames, 4)[:, 0, 0, 0], [0, 9, 9, 9])
    assert len(pad_frames(frames, 2)) == 2


def test_folder_is_read_in_order_with_captions_from_text_and_csv(tmp_path):
    save_png(tmp_path / "b.png", frame(20))
    save_png(tmp_path / "a/z.png", frame(10))
    write_video(tmp_path / "c.mp4", np.stack([frame(30)] * 4), 8)
    save_png(tmp_path / ".hidden.png", frame(0))
    (tmp_path / "b.txt").write_text("  from\nthe text ")
    (tmp_path / "README.md").write_text("no clip")
    (tmp_path / "captions.csv").write_text(
        '\ufefffile,split,caption\nb.png,test,from the list\na/z.png,,"one, two"\ngone.mp4,,nobody\n',
        encoding="utf-8",
    )
    source = FolderSource(tmp_path)
    entries = [source.entry(i) for i in range(len(source))]
    assert [(e.id, e.caption, e.split) for e in entries] == [
        ("b.png", "from the text", "test"),
        ("c.mp4", None, None),
        ("a/z.png", "one, two", None),
    ]
    assert [int(source[i].frames.mean().round()) // 10 for i in range(3)] == [2, 3, 1]
    assert source[1].frames.shape == (4, 8, 8, 3) and source[1].caption == ""
    assert list(reasons(source)) == ["gone.mp4"]


def test_zip_members_are_read_in_place(tmp_path):
    save_png(tmp_path / "one.png", frame(50))
    data = (tmp_path / "one.png").read_bytes()
    (tmp_path / "one.png").unlink()
    (tmp_path / "set").mkdir()
    with zipfile.ZipFile(tmp_path / "set/pack.zip", "w") as archive:
        for name in ("train/x.png", "../out.png", "/abs.png", "train/notes.txt", "c:/x.png"):
            archive.writestr(name, data)
    (tmp_path / "set/captions.csv").write_text("file,caption\ntrain/x.png,a grey square\n")
    (tmp_path / "bad.zip").write_bytes(b"PK not a zip")
    source = pickle.loads(pickle.dumps(FolderSource(tmp_path)))
    assert [source.entry(i).id for i in range(len(source))] == ["set/pack.zip/train/x.png"]
    assert source.entry(0).caption == "a grey square"
    assert (source[0].frames == 50).all()
    assert {name: reason.split(":")[0] for name, reason in source.refused} == {
        "set/pack.zip/../out.png": "unsafe",
        "set/pack.zip//abs.png": "unsafe",
        "set/pack.zip/c:/x.png": "unsafe",
        "bad.zip": "unreadable",
    }


def test_a_damaged_member_is_a_media_error(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("x.png", b"0123456789" * 20)
    data = (tmp_path / "a.zip").read_bytes().replace(b"0123456789", b"9876543210", 1)
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(MediaError, match="CRC"):
        FolderSource(tmp_path)[0]


def test_strips_become_frames(tmp_path):
    save_png(tmp_path / "strip.png", np.concatenate([frame(10 * k, 6, 4) for k in range(5)], axis=1))
    save_png(tmp_path / "uneven.png", frame(0, 6, 21))
    source = FolderSource(tmp_path, strip_frames=5, strip_fps=12.0)
    assert source[0].fps == 12.0
    np.testing.assert_array_equal(source[0].frames, np.stack([frame(10 * k, 6, 4) for k in range(5)]))
    np.testing.assert_array_equal(source.read(0, max_frames=3, place=1.0).frames[:, 0, 0, 0], [20, 30, 40])
    with pytest.raises(MediaError, match="21 pixels"):
        source[1]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("name,caption\na.png,x\n", "no file"),
        ("file,split\na.png,x\n", "no caption"),
        ("file,caption\n../a.png,x\n", "outside"),
        (b"file,caption\na.png,\xff\xfe\n", "UTF-8"),
    ],
)
def test_unusable_lists_are_user_errors(tmp_path, text, match):
    (tmp_path / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=match):
        FolderSource(tmp_path)


def test_captions_that_are_not_utf8_cost_one_clip(tmp_path):
    save_png(tmp_path / "a.png", frame(1))
    save_png(tmp_path / "b.png", frame(2))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    source = FolderSource(tmp_path)
    assert [source.entry(i).id for i in range(len(source))] == ["b.png"]
    assert list(reasons(source)) == ["a.png"]


def test_missing_folder_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        FolderSource(tmp_path / "nowhere")


def test_world_source_is_the_world():
    config = WorldConfig(seed=3)
    source = WorldSource(config, train=4, held_out=2)
    frames, caption = clip(config, 2)
    np.testing.assert_array_equal(source[2].frames, frames)
    assert source[2].caption == source.entry(2).caption == caption
    assert [source.entry(i).split for i in range(6)] == [split(0)] * 4 + ["held-out"] * 2
    assert len({source.entry(i).id for i in range(6)}) == 6
    with pytest.raises(IndexError):
        source[6]


def test_clip_checks_its_frames():
    with pytest.raises(ValueError, match="float"):
        Clip("a", np.zeros((1, 8, 8, 3)), 8.0, "", "test")
