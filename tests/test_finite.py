"""Values that are NaN or infinite are named, and nothing is drawn of them."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_caches import INFO, clip_row
from fixtures_runs import TINY, chain, one_device, run, trained  # noqa: F401

from sora_jax.config import from_dict, load
from sora_jax.data.storing.latents import add_latent, start_cache
from sora_jax.errors import NotFinite, UserError
from sora_jax.generate import command
from sora_jax.generate.preview import Reconstructions, denoiser_preview, reconstruction_preview
from sora_jax.generate.requests import Request
from sora_jax.nn.finite import named, not_finite
from sora_jax.train.autoencoder import AutoencoderRun, to_uint8
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.frozen import load_autoencoder, save_autoencoder
from sora_jax.train.state import MODEL

SIZE = (5, 24, 16)


def spoilt(tree, name, value=np.nan):
    """The tree with one value of the array of this name replaced."""

    def one(path, x):
        if jax.tree_util.keystr(path, simple=True, separator="/") != name:
            return x
        changed = np.array(x)
        changed.flat[0] = value
        return jax.device_put(changed, x.sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def a_name(tree) -> str:
    (path, _), *_ = jax.tree_util.tree_flatten_with_path(tree)[0]
    return jax.tree_util.keystr(path, simple=True, separator="/")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_arrays_that_are_not_finite_are_named(value):
    tree = {"b": {"w": jnp.ones((3, 2), jnp.bfloat16)}, "a": jnp.zeros(4), "n": jnp.arange(3)}
    assert not_finite(tree) == []
    assert not_finite(spoilt(tree, "b/w", value)) == ["b/w"]
    both = not_finite(spoilt(spoilt(tree, "b/w", value), "a", value))
    assert both == ["a", "b/w"] and named(both) == "a (the first of 2 arrays)"


def test_pixels_that_are_not_finite_are_no_picture():
    video = np.zeros((2, 4, 4, 3), np.float32)
    assert (to_uint8(video) == 128).all()
    video[1, 2, 3, 0] = np.nan
    with pytest.raises(NotFinite, match="a decoded clip has values that are not finite"):
        to_uint8(video)


def test_weights_are_looked_at_when_a_run_is_loaded(chain, trained, tmp_path, capfd, monkeypatch):  # noqa: F811
    """A NaN in one array: its name, the step and the other steps; exit code 2 and no file."""
    name, restore = a_name(trained.params), Checkpoints.restore_ema

    def damaged(self, averages, which="newest"):
        found = restore(self, averages, which)
        return {MODEL: (spoilt(found[MODEL][0], name), *found[MODEL][1:])}

    monkeypatch.setattr(Checkpoints, "restore_ema", damaged)
    out = tmp_path / "a.png"
    assert run("sample", f"--workdir={chain.transformer}", "--prompt=a red square", f"--out={out}", "--steps=1") == 2
    told = capfd.readouterr().err
    assert f"--workdir is '{chain.transformer}'; the averaged weights of its checkpoint 6 have values that" in told
    assert f"not finite, in {name}; --checkpoint can name another: 3" in told and "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_samples_are_looked_at_before_they_are_decoded(trained):  # noqa: F811
    broken = dataclasses.replace(trained, params=spoilt(trained.params, a_name(trained.params)))
    with pytest.raises(
        NotFinite, match="the clip of prompt 'a red square' .clip id 7, guidance 1.: the sampled latent"
    ):
        broken.generate(["a red square"], SIZE, steps=1, guidance=1.0, clip_ids=[7])


def test_decoded_clips_are_looked_at(trained, monkeypatch):  # noqa: F811
    """The one of three that is not finite is named, decoded whole, as a ring or in parts."""
    z = np.zeros((3, 2, 2, 4), np.float32)
    bad = z.copy()
    bad[1, 0, 0, 0] = np.nan
    with one_device():
        assert len(trained.decode([z, z])) == 2
        with pytest.raises(NotFinite, match="^second: a decoded clip has values that are not finite"):
            trained.decode([z, bad, z[:1]], names=["first", "second", "third"])
        with pytest.raises(NotFinite, match="^long: a decoded clip"):
            list(trained._parts(bad, trained_parts(trained), "long"))


def trained_parts(model):
    from sora_jax.models.tiling import TilingConfig

    return TilingConfig((1 + model.autoencoder.config.time_factor, 0, 0), TilingConfig().overlap)


def test_a_preview_that_is_not_finite_is_reported_and_not_drawn(chain, trained, tmp_path, capfd):  # noqa: F811
    """Training goes on: the preview returns."""
    broken = dataclasses.replace(trained, params=spoilt(trained.params, a_name(trained.params)))
    with one_device(), jax.set_mesh(trained.mesh):
        denoiser_preview(lambda _: broken, tmp_path)(3, {}, None)
    told = capfd.readouterr().err
    assert "sora-jax: the preview of step 3 is left out: the clip of prompt 'a red square moves right'" in told
    config = from_dict(AutoencoderRun, load(f"{TINY}:autoencoder", []))
    params = load_autoencoder(chain.autoencoder).params
    clips = [np.zeros((5, 16, 16, 3), np.uint8)]
    reconstruction_preview(Reconstructions(config, clips), ["a"] * len(clips), tmp_path)(
        4, {MODEL: spoilt(params, a_name(params))}, None
    )
    assert "the preview of step 4 is left out" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_is_not_finite_is_refused(chain, capfd, monkeypatch):  # noqa: F811
    monkeypatch.setattr(command, "trunk_ratios", lambda *_: np.full((2, 2), np.nan))
    assert run("calibrate", f"--workdir={chain.transformer}", "--steps=2") == 2
    assert "its samples are not finite" in capfd.readouterr().err
    assert not list(chain.transformer.glob("*skip*"))


def test_an_autoencoder_that_is_not_finite_is_neither_kept_nor_loaded(chain, tmp_path):  # noqa: F811
    whole = load_autoencoder(chain.autoencoder)
    name = a_name(whole.params)
    broken = dataclasses.replace(whole, params=spoilt(whole.params, name))
    with pytest.raises(NotFinite, match=f"not finite, in {name}"):
        save_autoencoder(broken, tmp_path / "new", {})
    assert not (tmp_path / "new").exists()
    shutil.copytree(chain.autoencoder / "frozen", tmp_path / "frozen")
    with pytest.MonkeyPatch.context() as patch:  # as earlier versions kept it
        patch.setattr("sora_jax.train.frozen._check_finite", lambda *_: None)
        save_autoencoder(broken, tmp_path / "frozen", {})
    with pytest.raises(UserError, match=f"the autoencoder in .* not finite, in {name}"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize("codes", [None, [[-1.0, 1.0], [-1.0, 1.0]]])
def test_a_latent_that_is_not_finite_is_named_and_not_kept(tmp_path, codes):
    """Also a discrete one, whose NaN has a nearest code as any number has."""
    info = dataclasses.replace(INFO, codes=codes)
    row, latent = clip_row(5, (1, 2, 2)), np.ones((1, 2, 2, 2), np.float32)
    latent[0, 1, 1, 1] = np.nan
    with (
        pytest.raises(NotFinite, match="clip 'clip-5': its latent has values that are not finite"),
        start_cache(tmp_path / "cache", info, 1).write(0) as writer,
    ):
        add_latent(writer, info, row, latent)
    assert not (tmp_path / "cache").exists()


def test_a_request_is_named_by_its_prompt_or_class():
    assert str(Request("a fox", (1, 2, 2), 3, guidance=2.5)) == "the clip of prompt 'a fox' (clip id 3, guidance 2.5)"
    assert str(Request("", (1, 2, 2), 1, label=207)) == "the clip of class 207 (clip id 1, guidance 1)"
