"""Training the autoencoder: its loss terms, its linear start, discrete latents, stages, and who learns when."""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_runs import build_options, run, write_clips

from sora_jax.config import from_dict, to_dict
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.diffusion.keys import Purpose
from sora_jax.errors import UserError
from sora_jax.evaluate.autoencoder import EvaluateOptions, evaluate_autoencoder
from sora_jax.kinds.run import train
from sora_jax.models import codes
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs, decode, encode, start_from_linear
from sora_jax.models.autoencoder_layers import shortcut_matrix
from sora_jax.models.codes import CodesConfig
from sora_jax.models.discriminator import DiscriminatorConfig
from sora_jax.models.first_stage import encoder_part
from sora_jax.nn.params import init
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train import reconstruction
from sora_jax.train.autoencoder import (
    CONTROL,
    DISCRIMINATOR,
    AutoencoderRun,
    StageConfig,
    _note,
    autoencoder_groups,
    autoencoder_loss,
)
from sora_jax.train.encode import encode_dataset
from sora_jax.train.frozen import load_autoencoder
from sora_jax.train.latent_scale import scale_by_effect
from sora_jax.train.linear_codec import fit_linear_codec
from sora_jax.train.loop import LoopConfig, split_batch
from sora_jax.train.optim import OptimConfig, make_optimizer, matrix_axes
from sora_jax.train.reconstruction import Aids, LossConfig, fits, reconstruction_loss, resize
from sora_jax.train.state import MODEL, init_state, make_optimizers
from sora_jax.train.step import make_step

SMALL = dict(
    time_factor=2, space_factor=4, patch=(1, 2), multipliers=(1, 2), width=8, latent_channels=4, encoder_blocks=1,
    decoder_blocks=1, kernels=((1, 3, 3), (3, 1, 1)), dtype="float32",
)  # fmt: skip
PLAIN = AutoencoderConfig(**SMALL)
LINEAR = AutoencoderConfig(**SMALL, linear=True)
FSQ = AutoencoderConfig(**SMALL | dict(latent_channels=2), codes=CodesConfig("fsq", (5, 4), warmup_noise=0.0))
KEY = jax.random.key(0)


def clips(batch=2, frames=5, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, frames, height, width, 3), np.uint8)


def floats(*size, **options):
    return jnp.asarray(clips(*size, **options), jnp.float32) / 127.5 - 1


def loss_of(model, loss, aids=Aids(), key=KEY, video=None):
    params = init(autoencoder_specs(model), jax.random.key(1))
    video = floats() if video is None else video
    return jax.jit(lambda p, v: reconstruction_loss(p, model, v, key, loss, aids))(params, video)


def block_means(x, block):
    """Means over blocks of (time, height, width); the first frame is repeated in front."""
    pt, ph, pw = block
    x = np.concatenate([x[:, :1]] * (pt - 1) + [x], axis=1)
    B, T, H, W, C = x.shape
    return x.reshape(B, T // pt, pt, H // ph, ph, W // pw, pw, C).mean((2, 4, 6))


def test_with_all_convolutions_zero_shortcuts_keep_the_mean_of_each_block():
    """Three channels all the way: the code is the mean colour of a block, and the decoder paints the block with it."""
    config = AutoencoderConfig(
        time_factor=2, space_factor=4, patch=(1, 1), multipliers=(1, 1, 1), width=3, latent_channels=3, shortcuts=True,
        encoder_blocks=1, decoder_blocks=1, kernels=((3, 3, 3),), dtype="float32",
    )  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, init(autoencoder_specs(config), KEY))
    eye = jnp.eye(3)[None, None, None]
    # Only the stem and the head are not shortcuts: let them copy the colour.
    stem = params["encoder"]["stem"]["weight"].at[-1:, 1:2, 1:2].set(eye)
    params["encoder"]["stem"]["weight"] = stem
    video = floats()
    mean, _ = encode(params, config, video)
    wanted = block_means(np.asarray(video), config.block)
    np.testing.assert_allclose(mean, wanted, atol=1e-5)
    params["decoder"]["norm"] = jnp.ones_like(params["decoder"]["norm"])
    z = jnp.abs(mean) + 0.5
    found = decode(params, config, z)
    assert not np.asarray(found).any()  # the head is zero, and no shortcut goes around it


@pytest.mark.parametrize("inputs, outputs, block", [(24, 6, 4), (24, 6, 8), (24, 24, 2), (12, 3, 4)])
def test_a_shortcut_up_repeats_what_a_shortcut_down_averages(inputs, outputs, block):
    down, up = shortcut_matrix(inputs, outputs, block), shortcut_matrix(outputs, inputs, block, down=False)
    np.testing.assert_allclose(up @ down, np.eye(outputs), atol=1e-6)
    np.testing.assert_allclose(down.sum(0), 1, atol=1e-6)
    x = np.random.default_rng(0).standard_normal((block, inputs // block)).astype(np.float32)
    if inputs // block == outputs:  # one output for each channel: the mean over positions
        np.testing.assert_allclose(x.ravel() @ down, x.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["width", "latent_channels"])
def test_shortcuts_name_the_widths_that_do_not_fit(name):
    with pytest.raises(UserError, match="model.shortcuts is True; one of the encoder joins .* channels"):
        AutoencoderConfig(**SMALL | {"width": 9 if name == "width" else 8, "latent_channels": 5}, shortcuts=True)


def test_a_linear_start_is_the_linear_codec():
    frames = list(clips(6))
    codec = fit_linear_codec(frames, LINEAR.block, 4)
    params = init(autoencoder_specs(LINEAR), KEY)
    params = start_from_linear(params, codec.components_PC, codec.mean_P, codec.std_C)
    mean, logvar = encode(params, LINEAR, floats(6))
    np.testing.assert_allclose(mean, np.stack([codec.encode(clip) for clip in frames]), atol=1e-4)
    assert np.unique(logvar).tolist() == [-5.0]
    wanted = np.stack([codec.decode(np.asarray(z)) for z in mean])
    np.testing.assert_allclose(decode(params, LINEAR, mean), wanted, atol=1e-4)


def test_channels_scaled_by_effect_are_the_components_of_a_linear_codec():
    """Noise of deviation d on component c of a linear codec changes pixels by d std_c / sqrt(pixels in a block)."""
    codec = fit_linear_codec(clips(8), LINEAR.block, 4)
    params = init(autoencoder_specs(LINEAR), KEY)
    params = start_from_linear(params, codec.components_PC, codec.mean_P, codec.std_C)
    latents = [codec.encode(clip) for clip in clips(8, 9, 32, 32, seed=1)]
    scale = scale_by_effect(params, LINEAR, latents, np.ones(4, np.float32))
    found = 1 / scale
    np.testing.assert_allclose(found / found[0], codec.std_C / codec.std_C[0], rtol=0.1)
    np.testing.assert_allclose(np.square(found).mean(), 1.0, rtol=1e-5)


TERMS = {
    "bands": dict(bands_weight=2.0),
    "pyramid": dict(pyramid_weight=2.0),
    "features": dict(features_weight=2.0),
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_added_with_its_weight(name):
    plain, more = (loss_of(PLAIN, LossConfig(**options)) for options in ({}, TERMS[name]))
    np.testing.assert_allclose(more.model, plain.model + 2.0 * more.metrics[name], rtol=1e-5)
    assert more.metrics[name] > 0 and more.metrics.keys() - plain.metrics.keys() == {name}


def test_latent_noise_is_scaled_by_the_latents_and_drawn_for_each_clip():
    from sora_jax.train.reconstruction import add_latent_noise

    z = 3.0 * jax.random.normal(KEY, (64, 3, 8, 8, 4))
    added = np.asarray(add_latent_noise(z, jax.random.key(2), 0.1) - z) / 3.0
    levels = added.std((1, 2, 3, 4))
    # |N(0, 0.1^2)| has the mean 0.1 sqrt(2 / pi), and the root mean square 0.1
    np.testing.assert_allclose(levels.mean(), 0.1 * math.sqrt(2 / math.pi), rtol=0.25)
    np.testing.assert_allclose(math.sqrt((levels**2).mean()), 0.1, rtol=0.25)
    assert levels.std() > 0.03


def test_larger_latents_do_not_escape_the_noise():
    """Noise is proportional to latents also in its derivative, so nothing is gained by making them larger."""
    from sora_jax.train.reconstruction import add_latent_noise

    z = jax.random.normal(KEY, (2, 3, 4, 4, 4))
    noisy, along = jax.jvp(lambda z: add_latent_noise(z, jax.random.key(2), 0.5), (z,), (z,))
    np.testing.assert_allclose(along, noisy, atol=1e-5)
    codes = z.at[..., 0].set(1.0)  # a channel that does not vary
    assert np.isfinite(jax.grad(lambda z: add_latent_noise(z, jax.random.key(2), 0.5).sum())(codes)).all()
    assert np.abs(noisy - z).max() > 0.1


def test_an_equivariant_decoder_has_no_further_loss():
    """Nearest-neighbour means commute with turns and with halving: the loss of half-size latents is that of clips."""
    x = floats(2, 3, 8, 8)
    half = resize(x, 0.5)
    np.testing.assert_allclose(half.mean((2, 3)), x.mean((2, 3)), atol=0.15)
    constant = jnp.full((1, 3, 8, 8, 3), 0.3)
    np.testing.assert_allclose(resize(constant, 0.75), 0.3, atol=1e-6)
    wanted = jax.image.resize(x, (2, 3, 6, 6, 3), "linear")  # antialiased by default
    np.testing.assert_allclose(resize(x, 0.75), wanted, atol=1e-5)
    assert fits(0.75, (4, 8)) and not fits(0.75, (4, 6))


def test_equivariance_mixes_the_loss_of_changed_latents_with_the_plain_one(monkeypatch):
    """The loss is linear in the share, and that of changed latents depends on how they are turned."""

    def found(share, seed, scales=(0.5, 1.0)):
        loss = LossConfig(equivariance=share, equivariance_scales=scales)
        return loss_of(LINEAR, loss, key=jax.random.key(seed))

    plain, half, changed = (found(share, 0) for share in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(half.model, (plain.model + changed.model) / 2, rtol=1e-5)
    assert abs(float(changed.model - plain.model)) > 1e-3
    assert half.metrics["l2"] == plain.metrics["l2"]
    keys = [jax.random.fold_in(jax.random.key(seed), Purpose.EQUIVARIANCE) for seed in (0, 3)]
    assert [int(jax.random.randint(key, (), 0, 4)) for key in keys] == [0, 2]  # quarters
    still, turned = (found(1.0, seed, (1.0,)).model for seed in (0, 3))
    monkeypatch.setattr(reconstruction, "_turn", lambda x, quarters, square: x)
    assert abs(float(turned - found(1.0, 3, (1.0,)).model)) > 1e-3
    np.testing.assert_allclose(still, plain.model, rtol=1e-6)


@functools.cache
def trained_steps(**loss):
    """Run two steps of a job with a discriminator; return the states before and after each, and the metrics."""
    config = AutoencoderRun(
        model=PLAIN, crop=(5, 16, 16), batch=2, image_share=0.0, loss=LossConfig(**loss),
        discriminator=DiscriminatorConfig(width=4, levels=2, lecam_weight=0.1),
    )  # fmt: skip
    groups = autoencoder_groups(config)
    optimizers = make_optimizers(groups, 10)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(groups, optimizers, 0, mesh)
        step = make_step(functools.partial(autoencoder_loss, config), optimizers)
        states, metrics = [jax.tree.map(np.asarray, state.params)], []
        for seed in range(3):
            state, found = step(state, {}, {"videos_BTHW3": jnp.asarray(clips(seed=seed))[None]})
            states.append(jax.tree.map(np.asarray, state.params))
            metrics.append(found)
    return config, states, metrics


SOFT = dataclasses.replace(FSQ, codes=CodesConfig("fsq", (5, 4), warmup_noise=0.5))
ACCUMULATED = LossConfig(
    bands_weight=0.3, features_weight=0.5, features_frames=2, equivariance=0.3, equivariance_scales=(0.5,)
)  # fmt: skip


@pytest.mark.parametrize("model, loss", [(PLAIN, ACCUMULATED), (SOFT, LossConfig())])
def test_accumulated_losses_are_those_of_the_whole_batch(model, loss):
    """Each crop has draws of its own, by its row in the whole batch, and the draws of a step are one for all parts."""
    config = AutoencoderRun(model=model, crop=(5, 16, 16), batch=16, image_share=0.5, loss=loss)
    whole = {f"{name}_BTHW3": clips(8, frames) for name, frames in (("videos", 5), ("images", 1))}
    whole |= {f"{name}_rows_B": np.arange(8, dtype=np.int32) for name in ("videos", "images")}
    params = {MODEL: jax.tree.map(lambda x: x + 0.1, init(autoencoder_specs(model), jax.random.key(1)))}

    @jax.jit
    def one(batch, part):
        return autoencoder_loss(config, params, {}, batch, jnp.int32(0), part)

    def accumulated(parts):
        found = [one({name: x[i] for name, x in split_batch(whole, parts).items()}, i) for i in range(parts)]
        return jax.tree.map(lambda *values: sum(values[1:], values[0]), *found)

    chex.assert_trees_all_close(accumulated(4), accumulated(1), rtol=1e-4, atol=1e-4)


def test_crops_of_one_clip_have_noise_of_their_own():
    video = jnp.concatenate([floats(1)] * 2)
    one, other, both = (
        float(loss_of(PLAIN, LossConfig(), Aids(rows_B=jnp.array(rows)), video=video[: len(rows)]).model)
        for rows in ([4], [7], [4, 7])
    )
    assert abs(one - other) > 1e-4
    np.testing.assert_allclose(both, (one + other) / 2, rtol=1e-5)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_discriminator_rests_until_it_starts_and_the_decoder_feels_it_later():
    _, states, metrics = trained_steps(
        adversarial_weight=0.5, matching_weight=1.0, discriminator_start=1, adversarial_start=2, adversarial_warmup=1
    )
    assert set(states[0]) == {MODEL, DISCRIMINATOR, CONTROL}
    resting = [same(a[DISCRIMINATOR], b[DISCRIMINATOR]) for a, b in zip(states, states[1:], strict=False)]
    assert resting == [True, False, False]
    distance = [m["videos/l1"] + 1e-6 * m["videos/kl"] for m in metrics]
    more = [m["loss/model"] - x for m, x in zip(metrics, distance, strict=True)]
    wanted = 0.5 * metrics[2]["videos/adversarial"] + metrics[2]["videos/matching"]
    np.testing.assert_allclose(more, [0, 0, wanted], atol=1e-5)


def test_controls_follow_scores_and_the_kl():
    """Plain gradient steps at rate 0.01: a running mean with decay 0.99, and a weight that grows with the excess."""
    _, states, metrics = trained_steps(adversarial_weight=0.5, kl_target=0.25, adversarial_warmup=1)
    real, weight = 0.0, math.log(1e-6)
    for state, found in zip(states[1:], metrics, strict=True):
        real += 0.01 * (float(found["videos/scores_real"]) - real)
        weight += 0.01 * (float(found["videos/kl"]) - 0.25)
        np.testing.assert_allclose(state[CONTROL]["real"], real, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(state[CONTROL]["log_kl_weight"], weight, rtol=1e-5)


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_decoded_pixels():
    _, _, metrics = trained_steps(adversarial_weight=0.5, adaptive_most=1e4, adversarial_warmup=1)
    weights = [float(m["videos/adversarial_weight"]) for m in metrics]
    assert all(0 < w < 0.5e4 for w in weights) and len(set(weights)) == 3


def test_muon_takes_weights_as_matrices_and_leaves_the_linear_path_to_adam():
    axes = matrix_axes(autoencoder_specs(LINEAR))
    assert axes["encoder"]["stem"]["weight"].reduction_axis == (0, 1, 2, 3)
    assert axes["encoder"]["stem"]["weight"].output_axis == (4,)
    assert axes["encoder"]["linear"]["matrix"] is None and axes["encoder"]["stem"]["bias"] is None
    optimizer = make_optimizer(OptimConfig(method="muon", warmup_steps=0, clip_norm=0.0), autoencoder_specs(LINEAR))
    params = init(autoencoder_specs(LINEAR), KEY)
    gradient = jax.tree.map(lambda x: jax.random.normal(KEY, x.shape), params)
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    matrix = np.asarray(updates["encoder"]["stem"]["weight"]).reshape(-1, 8)
    values = np.linalg.svd(matrix, compute_uv=False)
    assert values.max() / values.min() < 2.0  # nearly orthogonal, whatever the gradient
    first = np.asarray(updates["encoder"]["linear"]["matrix"])
    # Adam's first step is a constant, near its learning rate, against the sign of the gradient.
    np.testing.assert_array_equal(np.sign(first), -np.sign(gradient["encoder"]["linear"]["matrix"]))
    assert np.ptp(np.abs(first)) < 1e-6 and 0.9e-4 < np.abs(first).mean() < 2e-4


def small_run(data, **options):
    loop = LoopConfig(steps=2, log_every=1, save_every=0)
    optim = OptimConfig(warmup_steps=0)
    base = dict(data=str(data), crop=(5, 16, 16), batch=16, image_share=0.5, loop=loop, optim=optim)
    return AutoencoderRun(**base | options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoencoder_training")
    write_clips(folder / "clips")
    assert run(*build_options(folder / "clips", folder / "data")) == 0
    return folder / "data"


def test_stages_train_one_after_the_other_and_a_frozen_encoder_keeps_its_latents(data, tmp_path):
    adversary = LossConfig(adversarial_weight=0.1, latent_noise=0.1, adversarial_warmup=1)
    stages = (StageConfig(steps=2), StageConfig(steps=2, crop=(5, 24, 16), trained="decoder", loss=adversary))
    config = small_run(
        data, model=LINEAR, stages=stages, crops=((3, 16, 16),), discriminator=DiscriminatorConfig(width=4, levels=2),
        loop=LoopConfig(log_every=1, save_every=0), optim=OptimConfig(),
    )  # fmt: skip
    assert from_dict(AutoencoderRun, to_dict(config)) == config
    train(config, tmp_path / "run")
    first, last = (load_autoencoder(tmp_path / "run" / folder) for folder in ("stage_1", "stage_2"))
    assert load_autoencoder(tmp_path / "run").weights_digest == last.weights_digest != first.weights_digest
    assert same(encoder_part(first.params), encoder_part(last.params)) and not same(first.params, last.params)
    assert first.fingerprint == last.fingerprint and np.array_equal(first.mean_C, last.mean_C)
    encode_dataset(tmp_path / "run" / "stage_1", data, tmp_path / "latents")
    encode_dataset(tmp_path / "run", data, tmp_path / "latents")  # accepted: the latents are the same
    before = (tmp_path / "run" / "frozen" / "weights.npz").read_bytes()
    train(config, tmp_path / "run")
    assert (tmp_path / "run" / "frozen" / "weights.npz").read_bytes() == before
    with pytest.raises(UserError, match="--config.start is .*; its network is not that of config.model"):
        train(small_run(data, model=PLAIN, start=str(tmp_path / "run")), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_decoder_alone_needs_a_start():
    with pytest.raises(UserError, match="start is not given; with trained = 'decoder'"):
        AutoencoderRun(trained="decoder")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss=LossConfig(kl_target=1.0), model=FSQ), "loss.kl_target is 1.0; it must be 0 where no encoder"),
        (dict(stages=(StageConfig(),), loss=LossConfig(bands_weight=1.0)), "loss is changed; beside stages"),
        (dict(stages=(StageConfig(),), loop=LoopConfig(steps=7)), r"loop.steps is 7; .* stages\[i\].steps"),
        (dict(stages=(StageConfig(), StageConfig(crop=(5, 17, 16)))), r"stages\[1\]: crop is .5, 17, 16.: height"),
        (dict(loss=LossConfig(adversarial_weight=1.0, equivariance=0.5), crop=(5, 8, 8)), "too small for a discrim"),
        (dict(loss=LossConfig(lpips_weight=1.0, lpips_file="x")), "crop 5 x 16 x 16 is too small for LPIPS: 64"),
    ],
)
def test_options_that_contradict_each_other_are_named(options, message):
    with pytest.raises(UserError, match=message):
        small_run("data", **dict(model=PLAIN, loop=LoopConfig(), optim=OptimConfig()) | options)


def test_a_later_stage_that_cannot_be_trained_stops_before_the_first(data, tmp_path):
    config = small_run(
        data,
        model=PLAIN,
        loop=LoopConfig(),
        optim=OptimConfig(),
        stages=(StageConfig(), StageConfig(crop=(5, 512, 16))),
    )
    with pytest.raises(UserError, match="crop is 5 x 512 x 16"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cache_of_codes_gives_back_the_codes(data, tmp_path):
    train(small_run(data, model=FSQ), tmp_path / "run")
    autoencoder = load_autoencoder(tmp_path / "run")
    encode_dataset(tmp_path / "run", data, tmp_path / "latents")
    cache, dataset = LatentCache(tmp_path / "latents"), Dataset(data)
    frames = {dataset.row(i)["id"]: dataset[i].frames for i in range(len(dataset))}
    for i, name in enumerate(cache.ids(range(len(cache)))):
        wanted = next(autoencoder.encode([frames[name]]))
        np.testing.assert_allclose(cache[i], wanted, atol=1e-5)
        raw = cache[i] * autoencoder.std_C + autoencoder.mean_C
        index = np.asarray(codes.indices(FSQ.codes, raw))
        np.testing.assert_array_equal(index, cache.info.to_indices(cache[i]))
        assert index.max() < 20 and set(np.unique(np.round(raw[..., 0] * 2)).tolist()) <= {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert len(cache._read(cache._latents, 0)) == 4 * np.prod(cache.grids[0])  # one uint32 a position
    report = evaluate_autoencoder(tmp_path / "run", data, EvaluateOptions(clips=2))
    assert report.codes["size"] == 20 and 0 < report.codes["use"] <= 1 and "codes        20" in report.text


def test_evaluate_is_a_command(data, tmp_path, capsys):
    train(small_run(data, model=LINEAR), tmp_path / "run")
    capsys.readouterr()
    assert run("evaluate", f"--autoencoder={tmp_path / 'run'}", f"--data={data}", "--clips=2", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert 1 <= report["clips"] <= 2 and (tmp_path / "run" / "evaluation" / "comparison.png").exists()
    assert run("evaluate", f"--autoencoder={tmp_path / 'run'}", f"--data={data}", "--clips=0") == 2
    assert "--clips is 0; it must be positive" in capsys.readouterr().err


def test_the_bound_of_the_kl_weight_is_told_where_a_run_may_reach_it():
    """By L2 alone detail of deviation s is kept where s^2 > kl values / 2: a factor of 100 in the weight is 20 dB."""
    model = AutoencoderConfig(l1_weight=0.0, l2_weight=1.0, kl_weight=1e-6)
    quiet, told = (AutoencoderRun(model=dataclasses.replace(model, kl_weight=weight)) for weight in (1e-6, 1e-3))
    assert _note(quiet) == "" and "a smaller config.model.kl_weight keeps more" in _note(told)
