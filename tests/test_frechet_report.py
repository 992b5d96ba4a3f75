"""Own features of a small labelled dataset; reports of distances: their promises, protocols and errors."""

import dataclasses

import jax
import numpy as np
import pytest
from fixtures_datasets import write_dataset
from test_embed import inception_file

from sora_jax.data.storing.clips import Clip
from sora_jax.data.storing.manifest import Dataset, add_clip
from sora_jax.errors import UserError
from sora_jax.evaluate import frechet_report as module
from sora_jax.evaluate.features import FeaturesConfig, choose_frames, own_features, read_facts, stack
from sora_jax.evaluate.frechet_report import (
    METRICS,
    Embedder,
    FrechetOptions,
    check_ready,
    frechet_report,
    frechet_reports,
)
from sora_jax.evaluate.i3d import FvdProtocol
from sora_jax.evaluate.inception import fid_features
from sora_jax.parallel.mesh import make_mesh

SMALL = FeaturesConfig(frames=3, size=16, widths=(16, 16, 16), features=8, steps=200, batch=32, learning_rate=4e-3)
COLOURS = {"red": (255, 0, 0), "blue": (0, 0, 255)}
LABELLED = [(colour, side) for colour in COLOURS for side in ("left", "right")]


def draw(colour, side, rng, frames=5, size=16):
    """A square that moves to a side, with noise."""
    clip = rng.integers(0, 60, (frames, size, size, 3))
    top = rng.integers(0, size - 5)
    for t in range(frames):
        left = 2 * (t if side == "right" else frames - 1 - t) + 1
        clip[t, top : top + 5, left : left + 5] = COLOURS[colour]
    return np.uint8(clip)


def drawn(count, seed, kinds=LABELLED):
    rng = np.random.default_rng(seed)
    return [draw(*kinds[i % len(kinds)], rng) for i in range(count)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return written(tmp_path_factory.mktemp("own") / "data")


def written(out, count=128, **changes):
    with write_dataset(out, {"kind": "squares"}) as writer:
        for i, frames in enumerate(drawn(count, 0)):
            colour, side = LABELLED[i % 4]
            captions = {"original": f"A {colour} square moves {side}"}
            fields = {"captions": captions, "label": None} | changes
            add_clip(writer, Clip(f"{i}", frames, 8.0, **fields), f"{i}", "train" if i < count - 8 else "held-out")
    return out


@pytest.fixture(scope="module")
def options(dataset):
    return FrechetOptions(data=dataset, own=SMALL, batch=16)


@pytest.fixture(scope="module")
def classifier(dataset):
    return own_features(Dataset(dataset), SMALL)


def test_the_words_that_tell_clips_apart_are_learnt(classifier):
    """Colour is in every frame, the side in their order alone."""
    facts = {"word red": 2, "word blue": 2, "word left": 2, "word right": 2}  # and not "a", "square", "moves"
    assert classifier.classes == facts
    found = classifier.classify(stack(SMALL, drawn(80, 1)))
    said = np.array(LABELLED)[np.arange(80) % 4]
    for name, values in found.items():
        word = name.removeprefix("word ")
        assert np.mean(values == (said == word).any(1)) > 0.85, name


def test_features_are_kept_beside_the_clips_and_made_anew_for_other_configs(classifier, dataset):
    again = own_features(Dataset(dataset), SMALL)
    assert again.digest == classifier.digest and again.text == classifier.text
    (path,) = dataset.glob("own_features_*.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read.*remove it"):
        own_features(Dataset(dataset), SMALL)
    path.unlink()
    assert own_features(Dataset(dataset), SMALL).digest == classifier.digest  # training is deterministic
    with jax.set_mesh(make_mesh()):
        other = own_features(Dataset(dataset), dataclasses.replace(SMALL, seed=1, steps=2))
    assert other.digest != classifier.digest
    assert len(list(dataset.glob("own_features_*.safetensors"))) == 2


def test_labels_are_a_fact(tmp_path):
    data = Dataset(written(tmp_path / "data", 16, captions={}, label=3))
    with pytest.raises(UserError, match="clips that differ in their labels or in the words of their captions"):
        check_ready("own", FrechetOptions(data=data.path))
    rows = [row | {"label": i % 3} for i, row in enumerate(data.rows())]
    facts, classes = read_facts(rows)
    assert classes == {"label": 3} and facts["label"].tolist()[:4] == [0, 1, 2, 0]


def test_features_do_not_depend_on_batches_or_sizes_beside(classifier):
    clips = drawn(7, 2)
    wanted = np.stack(list(classifier.features(clips, 7)))
    mixed = [x for clip in clips for x in (clip, clip[:, :12])]
    for batch in (1, 3):
        np.testing.assert_allclose(list(classifier.features(mixed, batch))[::2], wanted, rtol=1e-4, atol=1e-4)


def test_chosen_frames_are_spread_over_the_clip():
    clip = np.arange(9)
    assert choose_frames(FeaturesConfig(frames=5), clip).tolist() == [0, 2, 4, 6, 8]
    assert choose_frames(FeaturesConfig(frames=3), clip[:1]).tolist() == [0, 0, 0]


def test_a_distance_is_the_same_for_any_batch_and_mesh_and_grows_with_the_difference(options, classifier):
    """The promise: equal to 1e-3; found here: to 1e-5."""
    real, made = drawn(64, 3), drawn(60, 4)
    wanted = frechet_report("own", real, made, options)
    assert (wanted.real, wanted.generated) == (64, 60)
    for batch in (1, 7, 64):
        changed = dataclasses.replace(options, batch=batch)
        found = frechet_report("own", iter(real), iter(made), changed)
        assert found.value == pytest.approx(wanted.value, rel=1e-5)
        with jax.set_mesh(make_mesh()):
            found = frechet_report("own", real, made, changed)
        for name in ("value", "low", "high", "infinite"):
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-6)
    order = np.random.default_rng(0).permutation(64)
    assert frechet_report("own", [real[i] for i in order], made, options).value == pytest.approx(wanted.value, rel=1e-5)
    sets = {"red": drawn(60, 4, LABELLED[:2]), "one": drawn(60, 4, LABELLED[:1]), "generated": made}
    found = frechet_reports("own", real, sets, options)
    assert found["generated"] == wanted
    assert wanted.value < 0.5 * found["red"].value < 0.5 * found["one"].value
    assert wanted.low < wanted.value < wanted.high and wanted.infinite < wanted.value
    assert found["one"].more["recall"] < 0.5 < wanted.more["recall"]


def test_the_report_names_what_it_depends_on(options, dataset, classifier):
    text = frechet_report("own", drawn(24, 3), drawn(6, 4), options).text
    for words in (
        "24 real, 6 generated clips",
        classifier.digest,
        "3 frames",
        "16 x 16",
        str(dataset),
        "(8)",
        "recall",
    ):
        assert words in text, words
    assert "95 %" not in text  # of six clips


def by_colour(options):
    """Stands for I3D, which takes a second a clip: the mean colour of the chosen frames."""
    protocol = options.fvd

    def features(clips):
        yield from ((i, {"pool": module.choose_frames(protocol, clip).mean((0, 1, 2))}) for i, clip in enumerate(clips))

    return Embedder(protocol.text, protocol.clips, protocol.ddof, features)


def test_no_more_clips_are_read_than_the_protocol_has(monkeypatch):
    monkeypatch.setitem(METRICS, "fvd", by_colour)
    clips = [np.repeat(clip, 2, axis=0) for clip in drawn(60, 5)]
    options = FrechetOptions(fvd=FvdProtocol(clips=40, frames=10))
    one, two = iter(clips), iter(clips)
    found = frechet_report("fvd", one, two, options)
    assert (found.real, found.generated, found.notes) == (40, 40, [])
    assert len(list(one)) == 20
    few = frechet_report("fvd", clips, clips[:30], options)
    assert few.notes == ["the protocol has 40 clips, and there are 30 generated"]
    assert "first 10 frames at stride 1" in few.text
    with pytest.raises(UserError, match="a clip has 5 frames and must have 10"):
        frechet_report("fvd", drawn(60, 5), clips, options)
    with pytest.raises(UserError, match="there are 1 generated clips"):
        frechet_report("fvd", clips, clips[:1], options)


def test_fid_counts_every_frame_and_takes_statistics_for_the_real_images(tmp_path, monkeypatch):
    """Random weights, and of the features the first: eigenvalues of two thousand take seconds."""
    some = jax.jit(lambda params, x: {name: y[:, :40] for name, y in fid_features(params, x).items()})
    monkeypatch.setattr(module, "fid_features", some)
    options = FrechetOptions(inception=inception_file(tmp_path / "inception.safetensors")[0], batch=4)
    clips = [clip[:count] for clip, count in zip(drawn(5, 6), (2, 1, 1, 1, 1))]
    found = frechet_report("fid", clips, clips[1:], options)
    assert set(found.more) == {"sfid", "inception_score", "precision", "recall"}
    assert (found.real, found.generated, found.more["precision"]) == (5, 4, 1.0)
    pairs = list(METRICS["fid"](options).features(iter(clips)))
    assert [owner for owner, _ in pairs] == [0, 0, 1, 2, 3, 4]
    pool, spatial = (np.stack([x[name] for _, x in pairs]) for name in ("pool", "spatial"))
    names = {"mu": pool.mean(0), "sigma": np.cov(pool, rowvar=False)}
    names |= {"mu_s": spatial.mean(0), "sigma_s": np.cov(spatial, rowvar=False)}
    np.savez(tmp_path / "reference.npz", **names)
    options = dataclasses.replace(options, reference=tmp_path / "reference.npz")
    other = frechet_report("fid", None, clips[1:], options)
    assert other.value == pytest.approx(found.value, rel=1e-4)
    assert other.more["sfid"] == pytest.approx(found.more["sfid"], rel=1e-4) and "precision" not in other.more
    assert "statistics of real" in other.text


@pytest.mark.parametrize("name, options, said", [
    ("fid", {}, "--fid.inception is not given"),
    ("fid", {"inception": "none.pth"}, "there is no such file"),
    ("own", {}, "--data is not given"),
    ("fvv", {}, "--metrics is 'fvv'; allowed: 'fvd', 'fid', 'own'"),
])  # fmt: skip
def test_what_is_missing_is_said_before_anything_is_read(name, options, said):
    with pytest.raises(UserError, match=said):
        check_ready(name, FrechetOptions(**options))


@pytest.mark.parametrize("field, value", [("size", 12), ("widths", (4,)), ("steps", 0), ("learning_rate", 0.0)])
def test_impossible_networks_are_refused(field, value):
    with pytest.raises(UserError, match=f"--own.{field} is "):
        FeaturesConfig(**{field: value})
