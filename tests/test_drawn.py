"""Training on the clips of a world as they are drawn, with pixels as latents."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.data.building.build import build
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig
from sora_jax.data.storing.drawn import DrawnClips, DrawnConfig
from sora_jax.data.storing.latents import LatentCache
from sora_jax.errors import UserError
from sora_jax.models import pixels
from sora_jax.models.first_stage import decode, encode
from sora_jax.models.pixels import PixelsConfig
from sora_jax.train.encode import encode_dataset
from sora_jax.train.frozen import UNTRAINED, load_autoencoder
from sora_jax.worlds import HELD_OUT, WorldConfig, clip

WORLD = WorldConfig(sizes=((24, 24), (24, 32)))
COLUMNS = ("id", "uid", "split", "captions", "kinds", "fps", "label", "weight", "variant", "t", "h", "w", "frames")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Encode the clips of a dataset of the world by the first stage of pixels."""
    folder = tmp_path_factory.mktemp("drawn")
    source = SourceConfig("world", world=WORLD, limit=8, world_held_out=2)
    build(BuildConfig(out=str(folder / "data"), sources=(source,), max_frames=9, multiple=8, workers=0))
    encode_dataset("pixels", folder / "data", folder / "latents")
    return LatentCache(folder / "latents")


def drawn(grey: bool = False) -> DrawnClips:
    config = DrawnConfig(WORLD, clips=6, held_out=2, grey=grey)
    return DrawnClips(config, load_autoencoder(config.first_stage).fingerprint)


@pytest.mark.parametrize("name", UNTRAINED)
def test_shipped_first_stages_of_pixels_are_whole_and_give_pixels_back(name):
    stage = load_autoencoder(name)
    frames = clip(WORLD, 0)[0]
    latent = next(stage.encode([frames]))
    assert latent.shape == (*frames.shape[:3], stage.config.latent_channels)
    back = next(stage.decode([latent]))
    expected = frames if name == "pixels" else np.repeat(frames.mean(-1, keepdims=True), 3, axis=-1)
    assert np.abs(back.astype(float) - expected).max() <= 1  # of 255


def test_drawn_clips_are_those_of_a_cache_of_the_world(cache):
    """Their ids, which key noise, their latents, captions and splits are the same."""
    found = drawn()
    assert cache.info.fingerprint == found.info.fingerprint
    places = {int(clip_id): place for place, clip_id in enumerate(cache.clip_ids)}
    assert len(places) == 8
    for index, clip_id in enumerate(found.clip_ids.tolist()):
        place = places[clip_id]
        np.testing.assert_allclose(found[index], cache[place], atol=1e-3)  # a cache keeps float16
        for name in ("id", "captions", "kinds", "split", "fps"):
            assert found.column(name)[index] == cache.column(name)[place]


def test_drawn_clips_have_every_column_of_a_cache(cache):
    found = drawn()
    for name in COLUMNS:
        assert found.column(name).type == cache.column(name).type, name
        assert len(found.column(name)) == len(found) == 8
    assert found.splits == {"train": 6, "held-out": 2}
    assert (found.grids == [found[i].shape[:3] for i in range(len(found))]).all()
    assert len(set(found.clip_ids.tolist())) == 8


def test_held_out_clips_are_those_of_the_world():
    found, (frames, caption) = drawn(), clip(WORLD, HELD_OUT + 1)
    np.testing.assert_allclose(found[7], frames / 127.5 - 1.0, atol=1e-6)
    assert found.column("captions")[7].as_py() == [caption] and found.column("split")[7].as_py() == "held-out"


def test_drawn_clips_may_be_pickled_for_workers():
    again = pickle.loads(pickle.dumps(drawn(grey=True)))
    np.testing.assert_array_equal(again[3], drawn(grey=True)[3])
    assert again[3].shape[-1] == 1 and again.digest == drawn(grey=True).digest != drawn().digest


def test_grey_pixels_are_the_mean_of_the_colours_and_decode_as_grey():
    config, video = PixelsConfig(1), jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5, 3)), jnp.float32)
    mean, logvar = encode({}, config, video)
    assert mean.shape == (2, 3, 4, 5, 1) and float(logvar.max()) < -20
    np.testing.assert_allclose(decode({}, config, mean), jnp.broadcast_to(mean, video.shape))
    np.testing.assert_allclose(mean[..., 0], video.mean(-1), atol=1e-6)
    assert jax.tree.leaves(pixels.autoencoder_specs(config)) == []


def test_wrong_numbers_of_clips_are_refused():
    for changes, sentence in (
        ({"clips": -1}, "drawn.clips is -1"),
        ({"clips": 0}, "drawn.clips is 0; it must be the number of clips"),
        ({"held_out": -1}, "drawn.held_out is -1"),
    ):
        with pytest.raises(UserError, match=sentence):
            dataclasses.replace(DrawnConfig(WORLD, clips=2), **changes)
