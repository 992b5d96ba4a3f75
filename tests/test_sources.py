"""Check what all sources have in common: options, labels, limits; the world; and the rules of size and length."""

import pickle
import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from fixtures_sources import decoded, entries, frame
from hypothesis import given
from hypothesis import strategies as st

from sora_jax.data.fit import FitError, SizeRule, crop_box, fit_length, fit_size, pad_frames
from sora_jax.data.sources import SourceConfig, make_source
from sora_jax.data.sources.opened import FileMedia, Held, Part, fingerprint
from sora_jax.data.sources.tables import Fields, annotations, number_labels
from sora_jax.data.viewing.write import save_png
from sora_jax.errors import UserError
from sora_jax.worlds import HELD_OUT, WorldConfig, clip, scene, split

lengths = st.integers(1, 300)
factors = st.integers(1, 16)
sides = st.integers(1, 500)


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
    with pytest.raises(UserError, match="--max-pixels is 100; it must be at least"):
        SizeRule(multiple=16, max_pixels=100)
    with pytest.raises(FitError, match="1x1"):
        SizeRule(16)(1, 1)


def test_padding_repeats_the_last_frame():
    frames = np.stack([frame(0), frame(9)])
    np.testing.assert_array_equal(pad_frames(frames, 4)[:, 0, 0, 0], [0, 9, 9, 9])
    assert len(pad_frames(frames, 2)) == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(name="foldr"), "--source is 'foldr'; it must be folder, "),
        (dict(name="tfds:"), "tfds:NAME"),
        (dict(name="webdataset"), "--path is not given; with --source=webdataset it must be a tar"),
        (dict(name="world"), "--limit is not given"),
        (dict(name="world", limit=3, strip_frames=2), "--strip-frames is 2; it must be left out"),
        (dict(path="a", weight=0), "--weight is 0; it must be finite and above 0"),
        (dict(path="a", weight=float("nan")), "--weight is nan"),
        (dict(path="a", strip_fps=0), "--strip-fps is 0"),
        (dict(path="a", strip_frames=0), "--strip-frames is 0; it must be at least 1"),
        (dict(path="a", limit=0), "--limit is 0; it must be at least 1"),
        (dict(path="a", label="name"), "--label is 'name'; it must be caption, class or both"),
        (dict(path="a", label_caption="a digit"), "--label-caption is 'a digit'; it must hold {label}"),
        (dict(path="a", split="train"), "--split is 'train'; it must be left out"),
        (dict(path="a", world_held_out=1), "--world-held-out is 1; with --source=folder it must be from 0 to 0"),
        (dict(name="world", limit=3, world_held_out=4), "from 0 to 3"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(UserError, match=match):
        SourceConfig(**options)


def test_the_world_is_a_source():
    world = WorldConfig(seed=3)
    source = make_source(SourceConfig("world", limit=6, world=world, world_held_out=2, weight=0.5))
    assert source.name == "world" and len(source) == 6
    numbers = [0, 1, 2, 3, HELD_OUT, HELD_OUT + 1]
    for entry, number in zip(entries(source), numbers, strict=True):
        assert entry.captions == {"original": scene(world, number).caption}
        assert (entry.split, entry.weight) == (split(number), 0.5)
    ids = [source.open(i).content_id() for i in range(6)]
    assert [name.rpartition("/")[2] for name in ids] == [str(number) for number in numbers]
    other = make_source(SourceConfig("world", limit=1, world=replace(world, fps=world.fps + 1)))
    assert other.open(0).content_id().rpartition("/")[0] != ids[0].rpartition("/")[0]  # another world, other clips
    frames, _ = clip(world, 2)
    np.testing.assert_array_equal(decoded(source, 2).frames, frames)
    assert decoded(source, 2).fps == world.fps
    assert entries(pickle.loads(pickle.dumps(source))) == entries(source)
    with pytest.raises(IndexError):
        source.entry(6)


def test_limit_spreads_evenly_and_weight_is_every_entry_s(tmp_path):
    for shade in range(10):
        save_png(tmp_path / f"{shade}.png", frame(shade))
    source = make_source(SourceConfig(path=str(tmp_path), limit=4, weight=2.5))
    assert [entry.file for entry in entries(source)] == ["0.png", "2.png", "5.png", "7.png"]
    assert {entry.weight for entry in entries(source)} == {2.5}
    np.testing.assert_array_equal(decoded(source, 2).frames[0], frame(5))
    assert len(make_source(SourceConfig(path=str(tmp_path), limit=40))) == 10


def test_labels_become_captions_numbers_or_both(tmp_path):
    for name in "abc":
        save_png(tmp_path / f"{name}.png", frame(1))
    (tmp_path / "captions.csv").write_text("file,caption,label\na.png,mine,sea_lion\nb.png,,ape\nc.png,none,\n")
    config = SourceConfig(path=str(tmp_path), label_caption="a photo of a {label}")
    found = {label: entries(make_source(replace(config, label=label))) for label in ("caption", "class", "both")}
    assert [entry.captions for entry in found["class"]] == [{"original": "mine"}, {}, {"original": "none"}]
    assert [entry.label for entry in found["class"]] == [entry.label for entry in found["both"]] == [1, 0, None]
    assert [entry.label for entry in found["caption"]] == [None] * 3
    lion, ape = "a photo of a sea lion", "a photo of a ape"
    texts = [{"original": "mine", "label": lion}, {"label": ape}, {"original": "none"}]
    assert [entry.captions for entry in found["caption"]] == [entry.captions for entry in found["both"]] == texts
    assert [entry.label_name for entry in found["caption"]] == ["sea_lion", "ape", None]


def test_a_source_pickles_small_and_sees_changes(tmp_path):
    for shade in range(50):
        save_png(tmp_path / f"{shade:02}.png", frame(shade))
    source = make_source(SourceConfig(path=str(tmp_path)))
    dumped = pickle.dumps(source)
    again = pickle.loads(dumped)
    assert len(dumped) < 1000 and entries(again) == entries(source) and pickle.loads(dumped) is again
    assert again.digest == make_source(SourceConfig(path=str(tmp_path), weight=3)).digest
    (tmp_path / "00.txt").write_text("words")
    changed = make_source(SourceConfig(path=str(tmp_path)))
    assert changed.digest != source.digest
    dumped = pickle.dumps(changed)
    save_png(tmp_path / "50.png", frame(50))
    with pytest.raises(UserError, match="has changed"):
        pickle.loads(dumped)


@given(st.lists(st.none() | st.integers(0, 99) | st.sampled_from(["ox", "ape", "7"])))
def test_class_names_are_numbered_in_sorted_order(labels):
    numbered = number_labels(labels)
    assert [number is None for number, _ in numbered] == [label is None for label in labels]
    if any(isinstance(label, str) for label in labels):
        assert [name for _, name in numbered] == [None if label is None else str(label) for label in labels]
        pairs = sorted({pair for pair in numbered if pair[0] is not None})
        assert [number for number, _ in pairs] == list(range(len(pairs)))
        assert [name for _, name in pairs] == sorted(name for _, name in pairs)
    else:
        assert [number for number, _ in numbered] == labels


def test_rows_say_captions_of_all_kinds():
    row = {"caption_b": " two\n words", "captions": {"c": "three", "original": "x"}, "caption": "one", "label": 3.0}
    said = annotations(row | {"split": "test", "file": "x"})
    assert list(said.captions.items()) == [("original", "one"), ("b", "two words"), ("c", "three")]
    assert (said.label, said.split) == (3, "test")
    assert annotations({"captions": ["a", "", "c"]}).captions == {"original": "a", "3": "c"}
    assert annotations({"captions": [("x", "a"), ("y", None)]}).captions == {"x": "a"}
    assert annotations({"text": "t"}).captions == {"original": "t"}
    named = annotations({"words": "w", "caption": "c", "no": "7"}, Fields("words", "no"))
    assert named == annotations({"caption": "w", "label": 7})
    empty = annotations({"caption": "nan", "caption_b": "<NA>", "split": "nan", "caption_c": "a nan"})
    assert empty.captions == {"c": "a nan"} and empty.split is None
    labels = dict.fromkeys(["NaN", "<NA>", "None", "NA"]) | {"none": "none", "na": "na", Decimal("3.0"): 3}
    labels |= {"-1": None, -1: None, "": None, None: None, "nan": None, " 12 ": 12, "2.0": 2, "10.": 10, "2.5": "2.5"}
    for written, label in labels.items():
        assert annotations({"label": written}).label == label
    assert annotations({"label": float("nan")}).label is None


@pytest.mark.parametrize(
    "row",
    [{"caption": 5}, {"caption": "\ud800"}, {"file": "\udce9.png"}, {"split": []}]
    + [{"label": label} for label in (1.5, 2**31, True, float("inf"), ["cat", "dog"], {}, b"cat")],
)
def test_rows_that_cannot_be_understood(row):
    assert re.search("; it must", annotations(row).problem)


def test_a_part_of_a_file_is_a_file(tmp_path):
    data = np.random.default_rng(0).bytes(200_000)
    (tmp_path / "x").write_bytes(data)
    with Part(tmp_path / "x", 1000, 150_000).open() as part:
        assert part.read() == data[1000:151_000] and part.read() == b""
        assert part.seek(-10, 2) == 149_990 and part.read(100) == data[150_990:151_000]
        assert part.seek(70_000) and part.read(5) == data[71_000:71_005] and part.tell() == 70_005


def test_content_ids_are_of_content(tmp_path):
    save_png(tmp_path / "a.png", frame(1))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.bin").write_bytes(b"....." + data + b"..")
    same = [FileMedia(tmp_path / "a.png"), FileMedia(Held(data)), FileMedia(Part(tmp_path / "b.bin", 5, len(data)))]
    assert len({media.content_id() for media in same}) == 1
    assert FileMedia(Held(data + b".")).content_id() != same[0].content_id()
    assert len(same[0].content_id()) == 24


def test_large_files_are_known_by_size_and_blocks(tmp_path):
    path = tmp_path / "large"

    def made(size, *written):
        with path.open("wb") as file:
            for at in written:
                file.seek(at)
                file.write(b"x")
            file.truncate(size)
        with path.open("rb") as file:
            return fingerprint(file)

    size = 2**24 + 2**23
    ids = [made(size), made(size + 1), made(size, 0), made(size, size - 1), made(size, 2**20 - 1)]
    assert len(set(ids)) == 5
    assert made(size, 2**20 + 1000) == ids[0]  # between the first two blocks
    assert made(2**24, 2**20 + 1000) != made(2**24)
