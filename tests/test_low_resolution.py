"""Super-resolution: clips at half their rows and columns in caches and packs, in the network, and by the commands."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near
from fixtures_caches import INFO, clip_row, packs_of, write_cache
from fixtures_runs import TINY, build_options, chain, one_device, run, with_random_weights  # noqa: F401

from sora_jax.data.feeding.pipeline import PackedBatches, PackingShares
from sora_jax.data.feeding.tokenizer import TokenizerConfig, train
from sora_jax.data.packing.packs import PackingConfig, PackItem, pack_batch, patchify
from sora_jax.data.reading.media import decode
from sora_jax.data.storing.drawn import DrawnClips, DrawnConfig
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing.write import write_video
from sora_jax.diffusion.keys import Purpose, step_key
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.errors import UserError
from sora_jax.generate.run import load_run
from sora_jax.generate.tasks import Tasks
from sora_jax.kinds import run_config
from sora_jax.models.denoiser import denoise, denoiser_specs
from sora_jax.models.walt_blocks import WaltConfig
from sora_jax.nn.pack import Pack
from sora_jax.parallel.mesh import make_mesh
from sora_jax.plan import report
from sora_jax.train.denoiser import DenoiserRun, denoiser_loss
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.low_resolution import with_low_noise
from sora_jax.train.metrics import read_metrics
from sora_jax.train.state import MODEL

C, PATCH = 2, (1, 2, 4)
MODEL_CONFIG = WaltConfig(
    depth=2,
    width=12,
    heads=2,
    patch=PATCH,
    latent_channels=C,
    spatial_window=(2, 2),
    spatiotemporal_window=(1, 2),
    positions=(2, 2, 2),
    low_resolution=True,
    self_conditioning=True,
    text=None,
    remat="none",
    dtype="float32",
)
PACKING = PackingConfig(length=24, slots=3, text_length=3)
RUN = DenoiserRun(model=MODEL_CONFIG, packing=PACKING)
RUN = dataclasses.replace(RUN, diffusion=dataclasses.replace(RUN.diffusion, process="vp", prediction="v"))


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal((*shape, C), np.float32)  # noqa: E731
    sizes = ((2, 4, 8), (1, 6, 4), (2, 2, 8))
    return [
        PackItem(draw(t, h, w), 7 + i, np.array([2]), low=draw(t, h // 2, w // 2)) for i, (t, h, w) in enumerate(sizes)
    ]


def packed(*clips) -> Pack:
    return Pack(**pack_batch([clips], RUN.packs), low_times_BS=np.zeros((1, PACKING.slots), np.float32))


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(MODEL_CONFIG), scale=0.3))


# ----------------------------------------------------------------------------------------------------------
# Caches and packs
# ----------------------------------------------------------------------------------------------------------


def test_a_token_has_what_lies_under_it(clips):
    """Latent row y of a clip lies over row y / 2 of its low resolution."""
    pack = packed(*clips)
    for slot, clip in enumerate(clips):
        places = np.flatnonzero(pack.segments_BL[0] == slot + 1)
        for place in places:
            t, y, x = pack.coords_BL3[0, place].astype(int)
            rows, columns = (slice(at * side // 2, (at + 1) * side // 2) for at, side in ((y, 2), (x, 4)))
            np.testing.assert_array_equal(pack.low_BLQ[0, place], clip.low[t, rows, columns].ravel())
    assert (pack.low_BLQ[0, pack.segments_BL[0] == 0] == 0).all()


def test_clips_without_their_first_frame_lose_it_in_the_low_resolution(tmp_path):
    rows = [clip_row(number, ((3, 1, 2)[number % 3], 4, 8)) for number in range(60)]
    cache = write_cache(tmp_path / "cache", rows, dataclasses.replace(INFO, low=True))
    packing = dataclasses.replace(RUN.packs, text_length=60)
    byte = train([], TokenizerConfig(kind="bytes", max_tokens=20))
    cut = 0
    stream = PackedBatches(cache, byte, packing, 4, 0, shares=PackingShares(headless=0.5))
    for pack in packs_of(stream, stream.report().packs):
        for slot, (t, _, _) in enumerate(pack["grids_S3"]):
            if t:
                (clip,) = np.flatnonzero(cache.clip_ids == pack["clip_ids_S"][slot])
                whole = cache.low(clip)
                cut += t < len(whole)
                own = pack["low_LQ"][pack["segments_L"] == slot + 1]
                np.testing.assert_array_equal(own, patchify(whole[len(whole) - t :], (1, 1, 2)))
    assert 10 < cut < 30


def test_drawn_clips_have_a_low_resolution_of_mean_pixels():
    clips = DrawnClips(DrawnConfig(clips=3, held_out=1), "")
    whole = clips.item(1)
    t, h, w, _ = whole.shape
    means = whole.reshape(t, h // 2, 2, w // 2, 2, 3).mean((2, 4))
    np.testing.assert_allclose(clips.low(1), means, atol=0.5 / 127.5 + 1e-6)


@pytest.fixture(scope="module")
def latents(chain):  # noqa: F811
    """The latents of the chain with those of half the size, made by the command."""
    options = [f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}", "--low"]
    return chain.made("low_latents", lambda out: ["data", "encode", *options, f"--out={out}"])


def test_a_cache_holds_clips_at_half_their_size(chain, latents, capfd):  # noqa: F811
    cache, dataset, autoencoder = LatentCache(latents), Dataset(chain.dataset), load_autoencoder(chain.autoencoder)
    frames = {clip.id: clip.frames for clip in map(dataset.__getitem__, range(len(dataset)))}
    for index, name in enumerate(cache.ids(range(len(cache)))):
        clip = frames[name].astype(float)
        means = (clip[:, ::2, ::2] + clip[:, 1::2, ::2] + clip[:, ::2, 1::2] + clip[:, 1::2, 1::2]) / 4
        (alone,) = autoencoder.encode([means.round().astype(np.uint8)], 1)
        np.testing.assert_allclose(cache.low(index), alone, rtol=2e-3, atol=2e-3)
        np.testing.assert_array_equal(cache[index], LatentCache(chain.latents)[index])
    options = ["data", "encode", f"--autoencoder={chain.autoencoder}", f"--data={chain.dataset}"]
    assert run(*options, f"--out={latents}", "--low") == 0, "made once"
    assert run(*options, f"--out={latents}") == 2 and run(*options, f"--out={chain.latents}", "--low") == 2
    told = capfd.readouterr().err
    assert "has a low resolution, and --low is not given: give another --out" in told
    assert "has no low resolution, which --low asks for: give another --out" in told


def test_clips_that_have_no_half_are_refused(chain, tmp_path, capfd):  # noqa: F811
    build = [option for option in build_options(chain.clips, tmp_path / "data") if "multiple" not in str(option)]
    assert run(*build, "--multiple=4", "--max-pixels=340") == 0
    options = [f"--autoencoder={chain.autoencoder}", f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}"]
    assert run("data", "encode", *options, "--low") == 2
    assert "heights and widths must be multiples of 8, as `data build --multiple=8`" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# The network
# ----------------------------------------------------------------------------------------------------------


@functools.cache
def program():
    """Compiled (params, pack) -> the output, and the gradient by the low resolution of its sum over clip 7."""

    def total(low_BLQ, params, pack):
        pack = dataclasses.replace(pack, low_BLQ=low_BLQ)
        times_BR = np.full(pack.row_slots_BR.shape, 0.6, np.float32)
        out_BLP = denoise(params, MODEL_CONFIG, pack, pack.tokens_BLP, times_BR)
        return (out_BLP * (pack.segments_BL == 1)[..., None]).sum(), out_BLP

    return jax.jit(lambda params, pack: jax.grad(total, has_aux=True)(pack.low_BLQ, params, pack))


def test_a_clip_reads_its_own_low_resolution_alone(params, clips):
    together, alone = packed(*clips), packed(clips[0])
    slope, out = program()(params, together)
    _, single = program()(params, alone)
    own = together.segments_BL[0] == 1
    assert (np.abs(slope[0][own]).max(1) > 1e-4).all() and (slope[0][~own] == 0).all()
    assert_near(out[0][own], single[0][alone.segments_BL[0] == 1], 1e-5)


def test_it_reads_what_depth_to_space_brings_to_the_size_of_the_clip(params, clips):
    """The paper's operator in NumPy, with weights of its own, and the same by the weights that they make together."""
    rng = np.random.default_rng(1)
    kernel, embed = rng.standard_normal((C, 2, 2, C)), rng.standard_normal((*PATCH[1:], C, MODEL_CONFIG.width))
    pack, (other, *_) = packed(clips[0]), clips

    # depth to space: position (2 i + a, 2 j + b) of the clip has channels (a, b) of position (i, j)
    t, h, w, _ = other.low.shape
    large = np.einsum("thwc,cabd->thawbd", other.low, kernel).reshape(t, 2 * h, 2 * w, C)
    wanted = patchify(large, PATCH) @ embed.reshape(-1, MODEL_CONFIG.width)

    halves = embed.reshape(1, 2, 2, 2, C, MODEL_CONFIG.width)  # (i, a, j, b): half the rows, half the columns
    composed = np.einsum("cabd,iajbde->ijce", kernel, halves).reshape(-1, MODEL_CONFIG.width)
    weight = params["patch"]["weight"].copy()
    weight[-len(composed) :] = composed
    own = params | {"patch": params["patch"] | {"weight": weight}}

    @jax.jit
    def embedded(low_BLQ):
        tokens, whole = [], dataclasses.replace(pack, low_BLQ=low_BLQ)
        keep = lambda _, x_BLD: tokens.append(x_BLD) or x_BLD  # noqa: E731
        denoise(own, MODEL_CONFIG, whole, pack.tokens_BLP, np.zeros(pack.row_slots_BR.shape), run_trunk=keep)
        return tokens[0][0][pack.segments_BL[0] == 1]

    assert_near(embedded(pack.low_BLQ) - embedded(0 * pack.low_BLQ), wanted, 1e-5)


def test_the_level_is_read(params, clips):
    pack = packed(*clips)
    _, clean = program()(params, pack)
    level = dataclasses.replace(pack, low_times_BS=np.float32([[0.0, 0.5, 0.0]]))
    _, noisy = program()(params, level)
    moved = np.abs(np.asarray(noisy - clean)[0]).max(1) > 1e-4
    np.testing.assert_array_equal(moved, pack.segments_BL[0] == 2)


# ----------------------------------------------------------------------------------------------------------
# Noise augmentation
# ----------------------------------------------------------------------------------------------------------


def noisy(pack: Pack, level: float, seed: int = 0) -> np.ndarray:
    found = noised(jax.device_put(pack), np.float32(level), np.uint32(seed))
    assert (found.low_times_BS == np.float32(level)).all()
    return np.asarray(found.low_BLQ[0])


@jax.jit
def noised(pack: Pack, level, seed) -> Pack:
    key = step_key(seed, 0, Purpose.LOW_NOISE)
    return with_low_noise(process_named("vp"), pack, key, jnp.full_like(pack.low_times_BS, level))


def test_noise_has_its_level_and_belongs_to_the_clip(clips):
    pack, level = packed(*clips), 0.4
    np.testing.assert_array_equal(noisy(pack, 0.0), pack.low_BLQ[0])
    a, b = (float(coefficient(jnp.float32(level))) for coefficient in (process_named("vp").a, process_named("vp").b))
    some = np.concatenate([noisy(pack, level, seed)[pack.segments_BL[0] > 0].ravel() for seed in range(50)])
    clean = np.tile(pack.low_BLQ[0][pack.segments_BL[0] > 0].ravel(), 50)
    noise = (some - a * clean) / b
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size) and abs(noise.var() - 1) < 4 * np.sqrt(2 / noise.size)
    first = [((noisy(pack, level) - a * pack.low_BLQ[0]) / b)[pack.segments_BL[0] == slot][0] for slot in (1, 2, 3)]
    assert min(np.abs(first[i] - first[i - 1]).max() for i in range(3)) > 0.1, "clips have one noise"
    other = packed(clips[2], clips[0])
    for slot, place in ((3, 1), (1, 2)):
        one = noisy(pack, level)[pack.segments_BL[0] == slot]
        np.testing.assert_array_equal(one, noisy(other, level)[other.segments_BL[0] == place])


def test_the_loss_of_clips_together_is_that_of_each(params, clips):
    """Levels and noise are functions of (seed, step, clip); without a level the loss is another one."""

    def loss_of(config):
        program = jax.jit(functools.partial(denoiser_loss, config))
        return lambda *clips: float(program({MODEL: params}, (), packed(*clips), np.int32(3), np.int32(0))[0][MODEL])

    loss = loss_of(RUN)
    together = loss(*clips)
    assert_near(together, sum(loss(clip) for clip in clips), 1e-5)
    clean = dataclasses.replace(RUN, diffusion=dataclasses.replace(RUN.diffusion, low_noise=0.0))
    assert abs(loss_of(clean)(*clips) - together) > 1e-3 * together


# ----------------------------------------------------------------------------------------------------------
# The commands
# ----------------------------------------------------------------------------------------------------------

SHORT = [
    "--config.loop.steps=4",
    "--config.loop.save_every=2",
    "--config.loop.log_every=1",
    "--config.held_out.every=2",
]
PREVIEW = ["--config.preview.clips=1", "--config.preview.steps=2", "--config.loop.preview_every=4"]
SETTINGS = SamplingConfig(steps="2", low_noise=0.2)
PROMPT = "a red square moves right"
CLIP = np.random.default_rng(2).integers(0, 256, (9, 8, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def finished(chain, latents, tmp_path_factory):  # noqa: F811
    """The options of a training, and the folder of a finished run."""
    folder = tmp_path_factory.mktemp("enlarges")
    model = "WaltConfig(depth=2, width=24, heads=2, patch=(1, 2, 2), spatial_window=(2, 2), latent_channels=4, "
    model += "low_resolution=True, text=base.model.text, remat='none')"
    lines = [
        "import dataclasses",
        "from sora_jax.config import load, to_config_dict",
        "from sora_jax.kinds import run_config",
        "from sora_jax.models.walt_blocks import WaltConfig",
        "def get_config(variant=''):",
        f"    base = run_config(load({str(TINY)!r} + ':transformer'))",
        f"    return to_config_dict(dataclasses.replace(base, model={model}))",
    ]
    (folder / "config.py").write_text("\n".join(lines))
    options = ["train", f"--config={folder / 'config.py'}", f"--config.latents={latents}", *SHORT, *PREVIEW]
    assert run(*options, f"--workdir={folder / 'run'}") == 0
    return options, folder / "run"


@pytest.fixture(scope="module")
def model(finished):
    with one_device():
        return with_random_weights(load_run(finished[1]))


def test_it_goes_on_to_the_bit_and_measures_held_out_clips(finished, tmp_path):
    options, straight = finished
    stopped = shutil.copytree(straight, tmp_path / "run")
    shutil.rmtree(stopped / "checkpoints" / "4")
    (stopped / "metrics.jsonl").unlink()
    assert run(*options, f"--workdir={stopped}") == 0
    found, wanted = ([r for r in read_metrics(f) if "loss" in r] for f in (stopped, straight))
    kept = ("step", "loss", "parameter_norm", "held_out/loss")
    assert [[r.get(k) for k in kept] for r in found] == [[r.get(k) for k in kept] for r in wanted[2:]]
    assert decode(straight / "samples" / "step_000004" / "00.mp4").frames.shape[0] == 9
    measured = [r["held_out/loss"] for r in read_metrics(straight) if "held_out/loss" in r]
    assert len(measured) == 2 and np.isfinite(measured).all()


def test_it_is_planned(finished, monkeypatch, capsys):
    """Compiled for a CPU device in place of a chip; tests/test_walt_mesh.py trains it on several."""
    monkeypatch.setattr(report, "topology_mesh", lambda config, _: make_mesh(config, jax.devices("cpu")[:1]))
    assert run("plan", *finished[0][1:], "--topology=v5e:1x1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["flops"] > 0


def test_clips_become_twice_as_large_together_as_alone_and_as_they_are(model):
    make, settings = Tasks(model), {"sampling": SETTINGS, "seed": 3, "guidance": 2.0}
    other = np.random.default_rng(3).integers(0, 256, (5, 16, 8, 3), dtype=np.uint8)
    tasks = [make.upsample(CLIP), make.upsample(other), make.upsample(255 - CLIP)]
    one, two, inverse = model.generate([PROMPT] * 3, tasks=tasks, clip_ids=[5, 6, 5], **settings)
    assert one.shape == (9, 16, 32, 3) and two.shape == (5, 32, 16, 3)
    alone = model.generate(PROMPT, tasks=tasks[:1], clip_ids=[5], **settings)
    assert np.abs(alone.astype(int) - one).max() <= 1
    assert np.abs(inverse.astype(int) - one).max() > 2, "it does not read the clip"
    settings["sampling"] = dataclasses.replace(SETTINGS, low_noise=0.0)
    clean = model.generate(PROMPT, tasks=tasks[:1], clip_ids=[5], **settings)
    assert np.abs(clean.astype(int) - one).max() > 2, "it has no noise"


def test_other_commands_measure_it_or_say_why_not(chain, finished, capfd):  # noqa: F811
    straight = finished[1]
    assert run("evaluate", straight, "--metrics=loss", f"--out={straight.parent / 'measured'}") == 0
    assert "held-out" in capfd.readouterr().out.lower()
    assert run("evaluate", straight, f"--data={chain.dataset}", "--metrics=consistency") == 2
    assert "that run makes clips of those of half the size" in capfd.readouterr().err
    assert run("calibrate", f"--workdir={straight}") == 2
    assert (
        "makes clips of those of half the size (model.low_resolution), and is not calibrated" in capfd.readouterr().err
    )
    card = (straight / "README.md").read_text()
    assert "--video=FILE --upsample" in card and "--metrics=loss" in card


def test_the_command_enlarges_a_clip_and_the_clips_of_another_run(chain, finished, tmp_path, monkeypatch):  # noqa: F811
    write_video(tmp_path / "small.gif", CLIP, 8.0)
    common = [f"--prompt={PROMPT}", "--steps=2", "--upscale=1"]
    enlarge = [f"--workdir={finished[1]}", f"--video={tmp_path / 'small.gif'}", "--upsample"]
    assert run("sample", *common, *enlarge, f"--out={tmp_path / 'one.gif'}") == 0
    assert decode(tmp_path / "one.gif").frames.shape == (9, 16, 32, 3)
    assert run("sample", *common, *enlarge, f"--then={finished[1]}", f"--out={tmp_path / 'two.gif'}") == 0
    assert decode(tmp_path / "two.gif").frames.shape == (9, 32, 64, 3)
    base = [f"--workdir={chain.transformer}", "--frames=5", "--height=16", "--width=8"]
    monkeypatch.chdir(finished[1].parent)
    assert run("sample", *common, *base, f"--then={finished[1].name}", f"--out={tmp_path / 'three.gif'}") == 0
    assert decode(tmp_path / "three.gif").frames.shape == (5, 32, 16, 3)
    monkeypatch.chdir(tmp_path)  # the recipe finds the runs from any folder
    assert run("sample", f"--like={tmp_path / 'three.gif'}", f"--out={tmp_path / 'again.gif'}") == 0
    np.testing.assert_array_equal(decode(tmp_path / "again.gif").frames, decode(tmp_path / "three.gif").frames)


MISTAKES = {
    "no video": ("low", [], "this run makes clips of those of half the size (model.low_resolution); give `sora-jax"),
    "not read": ("base", ["--video=a.gif", "--upsample"], "a clip of half the size is given, by --upsample or --then"),
    "alone": ("low", ["--upsample"], "--upsample is given without --video"),
    "two tasks": ("low", ["--video=a.gif", "--upsample", "--strength=0.5"], "--video is given with --strength and"),
    "sides": ("low", ["--video=a.gif", "--upsample", "--height=20"], "height is 20; it must be a multiple of 8"),
    "pixels": ("low", ["--video=a.gif", "--upsample", "--keep-pixels"], "--keep-pixels is given; it must stand beside"),
    "long": (
        "low",
        ["--frames=99"],
        "this run makes clips of those of half the size (model.low_resolution); give `sora-jax",
    ),
    "then itself": ("base", ["--then=BASE"], "which does not take the clips: a clip of half the size is given"),
    "then nothing": ("base", ["--then=nowhere"], "--then is 'nowhere'"),
    "then a task": ("base", ["--video=a.gif", "--extend=4", "--then=LOW"], "only --upsample goes with it"),
    "level": ("low", ["--sampling.low_noise=2"], "low_noise is 2.0; it must be from 0 (none) to 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(chain, finished, tmp_path, monkeypatch, capfd, name):  # noqa: F811
    which, options, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.gif", CLIP, 8.0)
    runs = {"low": str(finished[1]), "base": str(chain.transformer)}
    options = [option.replace("LOW", runs["low"]).replace("BASE", runs["base"]) for option in options]
    assert run("sample", f"--workdir={runs[which]}", "--prompt=a", "--out=no.gif", *options) == 2
    told = capfd.readouterr().err
    assert message in told and "Traceback" not in told


def test_mistakes_of_a_training_are_told(chain, latents, finished, tmp_path, capfd):  # noqa: F811
    options = [option for option in finished[0] if "latents" not in option]
    assert run(*options, f"--config.latents={chain.latents}", f"--workdir={tmp_path / 'no'}") == 2
    told = capfd.readouterr().err
    assert "has no low resolution, which the model reads: make it again with `sora-jax data encode ... --low`" in told
    named = ["--config.preview.clips=0", "--config.preview.prompts=('a',)", "--config.preview.sizes=((9,16,24),)"]
    assert run(*options, f"--config.latents={latents}", *named, f"--workdir={tmp_path / 'no'}") == 2
    assert "with model.low_resolution it must be preview.clips=N, to enlarge N clips" in capfd.readouterr().err
    with pytest.raises(
        UserError, match="model.patch is .*; with model.low_resolution its rows and columns must be even"
    ):
        dataclasses.replace(MODEL_CONFIG, patch=(1, 1, 2))
    with pytest.raises(UserError, match="packing.low is True; it must be left out, model.low_resolution says it"):
        dataclasses.replace(RUN, packing=dataclasses.replace(PACKING, low=True))


def test_earlier_configs_and_caches_have_none(chain):  # noqa: F811
    assert not LatentCache(chain.latents).info.low and "low" not in LatentCache(chain.latents).header
    kept = json.loads((chain.transformer / "config.json").read_text())
    for values, name in ((kept["diffusion"], "low_noise"), (kept["sampling"], "low_noise"), (kept["packing"], "low")):
        values.pop(name)
    assert run_config(kept) == load_run(chain.transformer).config
