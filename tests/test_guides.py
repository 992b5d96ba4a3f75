"""Guides: what a cache holds of them, how they are packed, and that they guide a clip without being in it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from fixtures_caches import INFO, clip_row, packs_of, write_cache
from fixtures_runs import chain, run, train_options, trained, with_random_weights  # noqa: F401

from sora_jax.data.feeding.pipeline import PackedBatches, PackingShares
from sora_jax.data.feeding.tokenizer import TokenizerConfig, train
from sora_jax.data.guides import KEY_FRAME, SKETCH, GuideCounts, Guides, guide_frames
from sora_jax.data.packing.packs import (
    PackingConfig,
    PackItem,
    add_guides,
    grid_of,
    layout_of,
    pack_batch,
    stack,
    token_counts,
    unpack,
)
from sora_jax.data.reading.media import decode
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing.write import write_video
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.generate.inputs import TaskOptions, read_inputs
from sora_jax.generate.requests import Request
from sora_jax.generate.sampler import sample_latents
from sora_jax.generate.tasks import Tasks
from sora_jax.models.denoiser import denoise
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.train.denoiser import denoiser_loss
from sora_jax.train.drawings import draw_edges, guide_pictures, trace_lines
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.state import MODEL

COUNTS = GuideCounts(key_frames=2, sketches=3)
SETTINGS = SamplingConfig(steps="3")
SIZE = (9, 16, 24)

# ----------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------


def test_edges_are_lines_on_the_outline_alone():
    picture = np.full((1, 20, 20, 3), 90, np.uint8)
    picture[0, 5:15, 5:15] = 200, 90, 90  # as grey as its ground but for one channel
    drawn = draw_edges(picture)
    assert set(np.unique(drawn)) == {0, 255} and (drawn == drawn[..., :1]).all()
    rows, columns = np.nonzero(drawn[0, ..., 0] == 0)
    from_side = np.minimum(np.abs(rows - 9.5) - 4.5, 9)
    assert {rows.min(), rows.max(), columns.min(), columns.max()} == {4, 15}
    assert np.maximum(from_side, np.abs(columns - 9.5) - 4.5).min() == 0, "no line inside"
    assert (draw_edges(picture[:, :4]) == 255).all()


@pytest.mark.parametrize("side, line", [(20, 1), (256, 3), (1024, 4)])
def test_lines_of_a_drawing_stay_however_small_it_becomes(side, line):
    drawing = np.full((1, side, side, 3), 255, np.uint8)
    low, high = side // 5, 4 * side // 5
    drawing[:, low:high, low:high] = 0
    drawing[:, low + line : high - line, low + line : high - line] = 230  # as dark as paper
    traced = trace_lines(drawing, (20, 20))[0, ..., 0]
    assert set(np.unique(traced)) == {0, 255}
    inside, outside = traced[7:13, 7:13], np.concatenate([traced[:2].ravel(), traced[:, :2].ravel()])
    assert (inside == 255).all() and (outside == 255).all()
    ring = [(traced[:, x] == 0) for x in range(5, 15)]
    assert all(column[:7].any() and column[13:].any() and column.sum() <= 8 for column in ring)


@pytest.mark.parametrize("frames", [1, 2, 9])
def test_frames_of_guides_are_different_ones_of_the_clip(frames):
    seen = set()
    for clip_id in range(200):
        chosen = guide_frames(COUNTS, clip_id, frames)
        key_frames, sketches = chosen[: min(2, frames - 1)], chosen[min(2, frames - 1) :]
        assert len(set(key_frames)) == len(key_frames) and not {0, frames} & set(key_frames)
        assert sketches[0] == 0 and len(set(sketches)) == len(sketches) == min(3, frames)
        seen |= set(key_frames)
    assert seen == set(range(1, frames))


@pytest.fixture(scope="module")
def guided_cache(chain):  # noqa: F811
    """The latents of the chain with guides, made by the command."""
    options = [f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}", "--key-frames=2", "--sketches=3"]
    return chain.made("guided_latents", lambda out: ["data", "encode", *options, f"--out={out}"])


def test_a_cache_holds_frames_and_edges_encoded_alone(chain, guided_cache):  # noqa: F811
    cache, dataset, autoencoder = LatentCache(guided_cache), Dataset(chain.dataset), load_autoencoder(chain.autoencoder)
    frames = {clip.id: clip.frames for clip in map(dataset.__getitem__, range(len(dataset)))}
    assert any(len(clip) > 4 for clip in frames.values())
    for index, name in enumerate(cache.ids(range(len(cache)))):
        clip, clip_id = frames[name], clip_id_of(name)
        chosen, pictures = guide_frames(COUNTS, clip_id, len(clip)), guide_pictures(COUNTS, clip_id, clip)
        first = min(2, len(clip) - 1)
        for count, kind, own in ((2, KEY_FRAME, slice(0, first)), (-3, SKETCH, slice(first, None))):
            found = cache.guides(index, count)
            assert found.kind == kind
            np.testing.assert_array_equal(found.times, np.array(chosen[own]) / 4)
            alone = list(autoencoder.encode(pictures[own], 1))
            assert len(alone) == len(found.latents)
            for z, picture in zip(found.latents, alone, strict=True):
                np.testing.assert_allclose(z, picture[0], rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(cache[index], LatentCache(chain.latents)[index])


def test_a_cache_with_other_guides_is_refused(chain, guided_cache, capfd):  # noqa: F811
    options = [f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}", f"--out={guided_cache}"]
    assert run("data", "encode", *options, "--key-frames=1") == 2
    assert "holds 2 key frames and 3 sketches of each clip: give these by --key-frames" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# Packs
# ----------------------------------------------------------------------------------------------------------

BYTES = train([], TokenizerConfig(kind="bytes", max_tokens=24))
PACKING = PackingConfig(length=64, slots=6, text_length=100, patch=(1, 2, 2), rows_per_clip=4, window=64, guides=True)
HALF = PackingShares(headless=0.3, key_frames=0.3, sketches=0.2)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Write a cache of many small clips, each with two key frames and three sketches, images with a sketch."""
    rows = [clip_row(number, ((3, 1, 2)[number % 3], 4, 6)) for number in range(240)]
    info = dataclasses.replace(INFO, guides=COUNTS)
    return write_cache(tmp_path_factory.mktemp("guides") / "cache", rows, info)


def test_guides_are_packed_behind_their_clip(many):
    stream = PackedBatches(many, BYTES, PACKING, 4, 0, shares=HALF)
    counts = {"key frames": 0, "sketches": 0, "clips": 0, "one sketch": 0}
    for pack in packs_of(stream, stream.report().packs):
        for slot, latent in enumerate(unpack(pack, PACKING.patch)):
            clip = int(np.flatnonzero(many.clip_ids == pack["clip_ids_S"][slot])[0])
            own, held = many[clip], many.column("guide_frames")[clip].as_py()
            np.testing.assert_array_equal(latent, own[len(own) - len(latent) :])
            places = np.flatnonzero((pack["segments_L"] == slot + 1) & (pack["guides_L"] > 0))
            counts["clips"] += own.shape[0] == 3
            if not len(places):
                continue
            kinds, (_, h, w) = pack["guides_L"][places], pack["grids_S3"][slot]
            number, kind = len(places) // (h * w), int(kinds[0])
            assert (kinds == kind).all() and len(places) % (h * w) == 0
            guides = many.guides(clip, number if kind == KEY_FRAME else -number)
            first = 0 if kind == KEY_FRAME else min(2, 2 * (own.shape[0] - 1))
            np.testing.assert_array_equal(guides.times * 2, held[first : first + number])
            np.testing.assert_array_equal(pack["coords_L3"][places, 0], np.repeat(guides.times, h * w))
            tokens = pack["tokens_LP"][places].reshape(number, h, w, 2, 2, -1)
            np.testing.assert_array_equal(
                tokens.transpose(0, 1, 3, 2, 4, 5).reshape(guides.latents.shape), guides.latents
            )
            assert (pack["rows_L"][places] == 4 * slot + 3).all()
            if own.shape[0] == 3:
                counts["key frames" if kind == KEY_FRAME else "sketches"] += 1
                counts["one sketch"] += kind == SKETCH and number == 1
        assert token_counts(stack([pack])).sum() == (pack["segments_L"] > 0).sum()
    for name, share in (("key frames", 0.3), ("sketches", 0.2), ("one sketch", 0.2 * 2 / 3)):
        deviation = np.sqrt(share * (1 - share) / counts["clips"])
        assert abs(counts[name] / counts["clips"] - share) < 3 * deviation, (name, counts)


def test_guides_are_drawn_by_seed_epoch_and_clip(many):
    one, other = (PackedBatches(many, BYTES, PACKING, 4, seed, shares=HALF) for seed in (0, 1))
    clips, copies = np.arange(len(many)), np.zeros(len(many), np.int64)
    drawn = one._guides(0, clips, copies)
    np.testing.assert_array_equal(one._guides(0, clips[::-1], copies)[::-1], drawn)
    for others in (one._guides(1, clips, copies), other._guides(0, clips, copies), one._guides(0, clips, copies + 1)):
        assert 0.2 < (others != drawn).mean() < 0.9


def test_a_clip_that_does_not_fit_with_its_guides_is_told_before_training(many):
    small = dataclasses.replace(PACKING, length=20)
    PackedBatches(many, BYTES, small, 4, 0)
    with pytest.raises(UserError, match="packing.length is 20; it must be at least 36, for clip .* and its guides"):
        PackedBatches(many, BYTES, small, 4, 0, shares=HALF)


# ----------------------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    """Return the trained run of the chain as one that was trained with guides, with random weights."""
    found = with_random_weights(trained)
    config = found.config
    given = dataclasses.replace(config.diffusion.given, first=0.5, key_frames=0.2, sketches=0.2)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, guides=True),
        diffusion=dataclasses.replace(config.diffusion, given=given),
    )
    kinds = 0.5 * np.random.default_rng(5).standard_normal((2, config.model.width), np.float32)
    return dataclasses.replace(found, config=config, params=found.params | {"guides": kinds})


@functools.cache
def prediction(config):
    def predict(params, pack):
        times_BR = per_slot((pack.clip_ids_BS % 7 + 1) / 9, pack.row_slots_BR)
        return denoise(params, config, pack, pack.tokens_BLP, times_BR)

    return jax.jit(predict)


def training_pack(model, guides: list[Guides | None]) -> Pack:
    """Pack three clips, each with its guides."""
    packing = dataclasses.replace(model.config.packs, length=96, slots=4)
    rng, items = np.random.default_rng(0), []
    for number, guide in enumerate(guides):
        z = rng.standard_normal((3 - number, 4, 4, model.config.model.latent_channels), np.float32)
        grid = grid_of(z.shape[:3], packing.patch)
        layout = layout_of(grid, packing.rows_per_clip)
        if guide is not None:
            layout = add_guides(layout, grid, guide.kind, guide.times, packing.rows_per_clip - 1)
        latents = None if guide is None else guide.latents
        items.append(PackItem(z, number + 1, np.array([3, 4]), layout=layout, guides=latents))
    return Pack(**pack_batch([items], packing))


def a_guide(model, kind, time=0.5, seed=3) -> Guides:
    z = np.random.default_rng(seed).standard_normal((1, 4, 4, model.config.model.latent_channels), np.float32)
    return Guides(kind, np.array([time], np.float32), z)


def test_a_guide_reaches_its_own_clip_alone_by_kind_time_and_picture(model):
    predict, params = prediction(model.config.model), jax.device_get(model.params)

    def clips(guide):
        pack = training_pack(model, [guide, None, None])
        output, segments = np.asarray(predict(params, pack))[0], pack.segments_BL[0]
        own = pack.guides_BL[0] == 0
        return [output[(segments == slot) & own] for slot in (1, 2, 3)]

    cases = [
        None,
        a_guide(model, KEY_FRAME),
        a_guide(model, SKETCH),
        a_guide(model, KEY_FRAME, time=0.25),
        a_guide(model, KEY_FRAME, seed=4),
    ]
    found = [clips(guide) for guide in cases]
    for first, second in ((0, 1), (1, 2), (1, 3), (1, 4)):
        assert np.abs(found[first][0] - found[second][0]).max() > 1e-3
        for mine, other in zip(found[first][1:], found[second][1:], strict=True):
            np.testing.assert_allclose(mine, other, atol=2e-5)


def test_guides_are_read_and_not_learnt(model):
    """Move a guide's own tokens: the loss changes by what they say to others, and has no weight for them."""
    pack = training_pack(model, [a_guide(model, KEY_FRAME), a_guide(model, SKETCH), None])
    without = training_pack(model, [None, None, None])
    loss, params = jax.jit(functools.partial(denoiser_loss, model.config)), {MODEL: jax.device_get(model.params)}
    (sums, (weight, _)), (_, (plain, _)) = (loss(params, (), one, np.int32(2), np.int32(0)) for one in (pack, without))
    assert float(weight[MODEL]) == float(plain[MODEL]) > 0
    other = dataclasses.replace(pack, tokens_BLP=np.where(pack.guides_BL[..., None] > 0, -1.0, pack.tokens_BLP))
    moved, _ = loss(params, (), other, np.int32(2), np.int32(0))
    assert abs(float(moved[MODEL]) - float(sums[MODEL])) > 1e-4


# ----------------------------------------------------------------------------------------------------------
# Tasks
# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    rng = np.random.default_rng(1)
    video = rng.integers(0, 60, SIZE, dtype=np.uint8)[..., None] + np.zeros(3, np.uint8)
    for t in range(len(video)):
        video[t, 4:10, t : t + 6] = 200, 60, 90
    return video


def sampled(model, tasks):
    requests = [Request("a red square", task.known.latent.shape[:3], i + 1, guidance=2.0, known=task.known)
                for i, task in enumerate(tasks)]  # fmt: skip
    with jax.set_mesh(model.mesh):
        return sample_latents(model, requests, SETTINGS, 0)


def test_guided_clips_together_are_as_alone(model, clip):
    make, edges = Tasks(model), draw_edges(clip)
    tasks = [
        make.guide(SIZE, {0: clip[:1], 8: clip[8:]}),
        make.guide(SIZE, {3: clip[3:4], 6: clip[6:7]}),
        make.guide(SIZE, sketches={0: edges[:1]}),
        make.guide((7, 16, 24), {5: clip[5:6]}, {2: edges[2:3]}),
        make.extend(clip, 4),
    ]
    together = sampled(model, tasks)
    for number, task in enumerate(tasks):
        requests = [Request("a red square", task.known.latent.shape[:3], number + 1, guidance=2.0, known=task.known)]
        with jax.set_mesh(model.mesh):
            (alone,) = sample_latents(model, requests, SETTINGS, 0)
        np.testing.assert_allclose(together[number], alone, atol=2e-4)
    np.testing.assert_array_equal(together[0][0], tasks[0].known.latent[0])
    plain = [sampled(model, [make.guide(SIZE, {0: clip[:1]})])[0]]
    plain += sampled(model, [make.guide(SIZE), make.guide(SIZE), make.guide(SIZE)])[1:]
    for number in (0, 2):
        assert np.abs(plain[number] - together[number])[1:].max() > 1e-2, "a guide changes nothing"


def test_a_drawing_of_light_lines_is_refused(tmp_path):
    paper = np.full((1, 32, 48, 3), 255, np.uint8)
    paper[:, 8:24, 10:30] = 0
    paper[:, 10:22, 12:28] = 255
    for name, drawing, fine in (("dark", paper, True), ("light", 255 - paper, False)):
        write_video(tmp_path / f"{name}.png", drawing, 6.0)
        options = TaskOptions(sketch=[str(tmp_path / f"{name}.png")])
        if fine:
            sketch = read_inputs(options, (1, 16, 24), (8, 8), False).sketches[0]
            assert sketch.shape == (1, 16, 24, 3) and 0 < (sketch == 0).mean() < 0.4
        else:
            with pytest.raises(UserError, match="most of it is dark: it must be dark lines on white, or give --edges"):
                read_inputs(options, (1, 16, 24), (8, 8), False)


def test_images_are_kept_to_the_pixel_where_asked(model, clip):
    task = Tasks(model, keep_pixels=True).guide((7, 16, 24), {0: clip[:1], 5: clip[5:6]})
    (made,) = model.generate(["a"], sampling=SETTINGS, tasks=[task])
    assert made.shape == (7, 16, 24, 3)
    np.testing.assert_array_equal(made[[0, 5]], clip[[0, 5]])


def test_the_commands_train_and_sample_with_guides(chain, guided_cache, clip, tmp_path, capfd):  # noqa: F811
    """Train a few steps with both kinds of guides, then ask for them by files."""
    given = "diffusion.given."
    changes = [f"latents={guided_cache}", "model.guides=True", f"{given}key_frames=0.4", f"{given}sketches=0.4"]
    changes += ["packing.length=128", "loop.steps=2", "loop.save_every=2", "loop.preview_every=0"]
    without = [change for change in changes if "latents" not in change]
    assert run(*train_options("transformer", tmp_path / "no", f"latents={chain.latents}", *without)) == 2
    assert "has none: make it with `sora-jax data encode ... --key-frames=K`, K of each clip" in capfd.readouterr().err
    workdir = tmp_path / "run"
    assert run(*train_options("transformer", workdir, *changes)) == 0
    write_video(tmp_path / "a.png", clip[:1], 6.0)
    write_video(tmp_path / "b.png", clip[8:], 6.0)
    common = [f"--workdir={workdir}", "--steps=2", "--prompt=a red square", "--frames=9", "--keep-pixels"]
    common.append("--upscale=1")
    options = [f"--image={tmp_path / 'a.png'}", f"--image={tmp_path / 'b.png'}@7", f"--sketch={tmp_path / 'b.png'}@4"]
    assert run("sample", *common, *options, "--edges", f"--out={tmp_path / 'made.gif'}") == 0
    made = decode(tmp_path / "made.gif").frames
    assert made.shape == (9, 16, 24, 3)
    assert np.abs(made[[0, 7]].astype(int) - clip[[0, 8]]).mean() < 6  # a GIF has 256 colours
    assert run("sample", f"--like={tmp_path / 'made.gif'}", f"--out={tmp_path / 'again.gif'}") == 0
    np.testing.assert_array_equal(decode(tmp_path / "again.gif").frames, made)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--image=a.png@4"],
            "--image is for frame 4; a run with diffusion.given.key_frames = 0 takes that of frame 0",
        ),
        (["--sketch=a.png"], "--sketch is for frame 0; a run with diffusion.given.sketches = 0 takes none"),
        (["--image=a.png@²"], "--image is 'a.png@²'; behind @ there must be the number of a frame"),
        (["--image=a.png@4", "--pad=8,0,0,0"], "--pad is given beside --image"),
        (["--image=a.png", "--out=one.png"], "--image is the only frame; nothing is to be made"),
        (["--loop", "--frames=8", "--history-guidance=2"], "--history-guidance is 2.0; it is for clips of which"),
        (["--image=a.png@x"], "--image is 'a.png@x'; behind @ there must be the number of a frame, from 0"),
        (["--history-guidance=-1", "--image=a.png"], "--history-guidance is -1.0; it must be 0 or more, and finite"),
        (["--keep-pixels"], "--keep-pixels is given; it must stand beside --image"),
        (["--image=a.png", "--negative=a", "--guidance=1"], "negative is 'a'; it needs a guidance other than 1"),
        (["--image=a.png", "--image=a.png@0"], "--image is given twice for a frame; add @FRAME to a file's name"),
        (["--image=a.png@9", "--frames=9"], "--image is for frame 9; the clip has the frames 0 to 8"),
        (["--image=a.png", "--edges"], "--edges is given without --sketch"),
        (["--image=a.png", "--image=a.png@4", "--pad=8,0,0,0"], "--pad is given beside --image"),
        (["--sketch=a.png", "--loop"], "--loop is given beside --sketch"),
        (["--image=b.png"], "--image is 'b.png'; it cannot be read"),
    ],
)
def test_mistakes_are_told(chain, clip, tmp_path, monkeypatch, capfd, options, message):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.png", clip[:1], 6.0)
    assert run("sample", f"--workdir={chain.transformer}", "--prompt=a", "--out=no.mp4", *options) == 2
    told = capfd.readouterr().err
    assert message in told and "Traceback" not in told
