"""The frozen autoencoder: statistics, fingerprint, damage, and the latents made with it."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from fixtures_runs import build_options, chain, one_device, run  # noqa: F401

from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import Dataset
from sora_jax.errors import UserError
from sora_jax.models import autoencoder as causal
from sora_jax.models import first_stage
from sora_jax.models.autoencoder import AutoencoderConfig, autoencoder_specs
from sora_jax.models.tiling import TilingConfig
from sora_jax.nn.params import abstract
from sora_jax.train import encode as encoding
from sora_jax.train import frozen
from sora_jax.train.encode import EncodeOptions
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder, save_autoencoder


@pytest.fixture(scope="module")
def autoencoder(chain):  # noqa: F811
    return load_autoencoder(chain.autoencoder)


def test_latents_have_mean_0_and_deviation_1_over_what_was_measured(chain, autoencoder):  # noqa: F811
    dataset = Dataset(chain.dataset)
    clips = [dataset[row["index"]].frames for row in dataset.rows("train")]
    values = np.concatenate([z.reshape(-1, z.shape[-1]) for z in autoencoder.encode(clips)])
    np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(values.std(0), 1, atol=1e-3)


def test_clips_of_mixed_sizes_come_back_in_order(chain, autoencoder):  # noqa: F811
    dataset = Dataset(chain.dataset)
    clips = [dataset[i].frames for i in (0, 2, 1, 3, 4, 5)]
    assert len({a.shape == b.shape for a, b in zip(clips, clips[1:])}) == 2  # sizes change, and also stay
    latents = list(autoencoder.encode(clips))
    for clip, latent in zip(clips, latents, strict=True):
        np.testing.assert_allclose(latent, next(autoencoder.encode([clip])), atol=1e-5)
    shared = autoencoder.encode(clips, batch=4, padded_shapes=[(9, 24, 24)])  # all by one program
    for latent, other in zip(latents, shared, strict=True):
        assert latent.shape == other.shape
        np.testing.assert_allclose(other, latent, atol=1e-4)
    decoded = list(autoencoder.decode(latents, batch=4))
    assert [clip.shape for clip in decoded] == [clip.shape for clip in clips]
    assert all(clip.dtype == np.uint8 for clip in decoded)


def test_the_cache_holds_these_latents_and_the_autoencoder(chain, autoencoder):  # noqa: F811
    dataset, cache = Dataset(chain.dataset), LatentCache(chain.latents)
    rows = {row["id"]: row for row in dataset.rows()}
    for i, name in enumerate(cache.ids(range(len(cache)))):
        latent = next(autoencoder.encode([dataset[rows[name]["index"]].frames]))
        np.testing.assert_allclose(cache[i], latent, atol=2e-3)  # float16
    fingerprints = {load_autoencoder(getattr(chain, name)).fingerprint for name in ("latents", "transformer")}
    assert fingerprints == {autoencoder.fingerprint, cache.info.fingerprint}


def changed(autoencoder: FrozenAutoencoder, what: str) -> FrozenAutoencoder:
    if what == "config":
        return dataclasses.replace(autoencoder, config=dataclasses.replace(autoencoder.config, time_factor=2))
    if what in ("encoder", "decoder"):
        part = autoencoder.params[what]
        head = part["head"] | {"bias": part["head"]["bias"].at[-1].add(1e-6)}
        return dataclasses.replace(autoencoder, params=autoencoder.params | {what: part | {"head": head}})
    return dataclasses.replace(autoencoder, **{what: getattr(autoencoder, what) * np.float32(1.0001)})


@pytest.mark.parametrize("what", ["config", "encoder", "mean_C", "std_C"])
def test_the_fingerprint_is_of_all_that_latents_depend_on(autoencoder, what):
    assert changed(autoencoder, what).fingerprint != autoencoder.fingerprint


def test_a_decoder_that_was_trained_further_decodes_the_same_latents(autoencoder):
    other = changed(autoencoder, "decoder")
    assert other.fingerprint == autoencoder.fingerprint and other.weights_digest != autoencoder.weights_digest
    older, other = (dataclasses.replace(one, version=2) for one in (autoencoder, other))
    assert other.fingerprint != older.fingerprint  # versions 1 and 2 covered the decoder


def test_a_run_is_sampled_with_a_decoder_that_was_trained_further(chain, tmp_path, capsys, autoencoder):  # noqa: F811
    sample = ["sample", f"--workdir={chain.transformer}", "--prompt=a fox", "--steps=1", "--frames=5", "--height=16"]
    for what, code in (("decoder", 0), ("encoder", 2)):
        save_autoencoder(changed(autoencoder, what), tmp_path / what, {})
        out = f"--out={tmp_path / 'fox.gif'}"
        assert run(*sample, "--width=24", out, f"--autoencoder={tmp_path / what}") == code
    assert "it has other latents than the autoencoder in" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(kl_weight=0.5), dict(remat=True), dict(dtype="bfloat16"), dict(l1_weight=2.0)])
def test_the_fingerprint_leaves_out_what_changes_no_latent(autoencoder, change):
    other = dataclasses.replace(autoencoder, config=dataclasses.replace(autoencoder.config, **change))
    assert other.fingerprint == autoencoder.fingerprint
    older, other = (dataclasses.replace(one, version=1) for one in (autoencoder, other))
    assert other.fingerprint != older.fingerprint != autoencoder.fingerprint  # version 1 covered all fields


def test_a_field_that_is_added_to_a_config_leaves_autoencoders_readable(chain, tmp_path, monkeypatch):  # noqa: F811
    @dataclasses.dataclass(frozen=True)
    class Later(AutoencoderConfig):
        """The config of a later version, with one more field."""

        adversarial_weight: float = 0.0

    old = load_autoencoder(chain.autoencoder)
    monkeypatch.delitem(first_stage.MODULES, AutoencoderConfig)
    monkeypatch.setitem(first_stage.MODULES, Later, causal)
    new = load_autoencoder(chain.autoencoder)
    assert type(new.config) is Later and new.fingerprint == old.fingerprint
    first = dataclasses.replace(old, version=1)
    assert dataclasses.replace(new, version=1).fingerprint == first.fingerprint


def test_the_latents_of_known_weights_are_those_of_this_version_of_the_code():
    """If this fails, a latent has changed for the same weights: change `frozen.VERSION`, then the numbers here."""
    config = AutoencoderConfig(
        time_factor=2, space_factor=4, patch=(1, 2), multipliers=(1, 2), width=4, latent_channels=2, encoder_blocks=1,
        decoder_blocks=1, dtype="float32",
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(abstract(autoencoder_specs(config)))
    waves = [0.3 * np.sin(np.arange(np.prod(x.shape), dtype=np.float32) + i) for i, x in enumerate(leaves)]
    params = jax.tree.unflatten(tree, [wave.reshape(x.shape) for wave, x in zip(waves, leaves, strict=True)])
    statistics = np.array([0.1, -0.2], np.float32), np.array([2.0, 0.5], np.float32)
    clip = (np.arange(3 * 8 * 8 * 3) * 7 % 256).reshape(3, 8, 8, 3).astype(np.uint8)
    latent = next(FrozenAutoencoder(config, params, *statistics).encode([clip]))
    # Copied from what this code made: no outside source knows these numbers, and none is needed. They are a trip wire:
    # caches hold latents of earlier versions, which a change of the code would silently mix with its own.
    first_rows = [[[-0.1145, 0.4435], [-0.0245, -0.5331]], [[0.0392, 0.5596], [0.0109, 0.0911]]]
    np.testing.assert_allclose(latent[:, :, 0], first_rows, atol=2e-4)
    assert frozen.VERSION == 3


def damage_cut(folder):
    data = (folder / "weights.npz").read_bytes()
    (folder / "weights.npz").write_bytes(data[: len(data) // 2])


def damage_flip(folder):
    data = bytearray((folder / "weights.npz").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "weights.npz").write_bytes(data)


def damage_lost(folder):
    with np.load(folder / "weights.npz") as file:
        kept = dict(list(dict(file).items())[1:])
    np.savez(folder / "weights.npz", **kept)


def damage_gone(folder):
    (folder / "weights.npz").unlink()


def damage_empty(folder):
    (folder / "weights.npz").write_bytes(b"")


def damage_record(folder):
    (folder / "autoencoder.json").write_text('{"config": {')


def damage_other(folder):
    record = json.loads((folder / "autoencoder.json").read_text())
    record["config"]["time_factor"] = 2
    (folder / "autoencoder.json").write_text(json.dumps(record))


DAMAGES = [damage_cut, damage_flip, damage_lost, damage_gone, damage_empty, damage_record, damage_other]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_sentence(chain, tmp_path, damage):  # noqa: F811
    shutil.copytree(chain.autoencoder / "frozen", tmp_path / "frozen")
    damage(tmp_path / "frozen")
    with pytest.raises(UserError, match=r"^[^\n]* is damaged[^\n]*$"):
        load_autoencoder(tmp_path)


def encode(chain, out, data=None, autoencoder=None) -> int:  # noqa: F811
    options = [f"--autoencoder={autoencoder or chain.autoencoder}", f"--data={data or chain.dataset}", f"--out={out}"]
    return run("data", "encode", *options)


def test_a_complete_cache_is_kept_and_one_of_something_else_refused(chain, tmp_path, capsys, autoencoder):  # noqa: F811
    out = tmp_path / "latents"
    shutil.copytree(chain.latents, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert encode(chain, out) == 0
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    save_autoencoder(changed(autoencoder, "encoder"), tmp_path / "other", {})
    assert encode(chain, out, autoencoder=tmp_path / "other") == 2
    assert "another autoencoder" in capsys.readouterr().err
    fewer = [*build_options(chain.clips, tmp_path / "fewer"), "--limit=3"]
    assert run(*fewer) == 0 and encode(chain, out, data=tmp_path / "fewer") == 2
    assert "other clips" in capsys.readouterr().err
    again = tmp_path / "again"  # the same ids and sizes, other pixels
    assert run(*build_options(chain.clips, again), "--place=start") == 0 and encode(chain, out, data=again) == 2
    assert "other clips" in capsys.readouterr().err


def test_a_complete_cache_knows_the_tiles_that_clips_were_cut_into(chain, tmp_path):  # noqa: F811
    def encode_in(name, tile, overlap=0.5):
        with one_device():
            options = EncodeOptions(tiles=TilingConfig(tile, overlap))
            encoding.encode_dataset(chain.autoencoder, chain.dataset, tmp_path / name, options)
        return LatentCache(tmp_path / name)

    cut, whole = encode_in("cut", (5, 16, 0)), LatentCache(chain.latents)
    assert cut.info.tiles == {"tile": [5, 16, 0], "overlap": 0.5} and cut.info != whole.info
    assert cut.digest != whole.digest
    uncut = encode_in("uncut", (17, 24, 24))  # no clip is larger
    assert uncut.info == whole.info and "tiles" not in uncut.info.header() and uncut.digest == whole.digest
    assert encode_in("cut", (5, 16, 0)).digest == cut.digest
    for tile, overlap, given in (((0, 0, 0), 0.5, "whole clips"), ((5, 16, 0), 0.25, "tiles of 5x16x0 with .* 0.25")):
        with pytest.raises(UserError, match=f"make {given}; .* was made of tiles of 5x16x0 with overlap 0.5; remove"):
            encode_in("cut", tile, overlap)


def test_an_interrupted_copy_of_the_autoencoder_is_made_again(chain, tmp_path, autoencoder):  # noqa: F811
    (tmp_path / "run" / "frozen").mkdir(parents=True)
    (tmp_path / "run" / "frozen" / "weights.npz").write_bytes(b"half")
    encoding.copy_autoencoder(chain.autoencoder, tmp_path / "run")
    assert load_autoencoder(tmp_path / "run").fingerprint == autoencoder.fingerprint


def test_an_interrupted_encode_goes_on_after_its_last_complete_shard(chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    out, options = tmp_path / "latents", EncodeOptions(clips_per_shard=2)
    whole, encoded = FrozenAutoencoder.encode, []

    def counted(self, clips, batch=16, padded_shapes=None, stop=None, **options):
        for number, clip in enumerate(clips):
            if number == stop:
                raise KeyboardInterrupt
            encoded.append(clip.shape)
            yield next(whole(self, [clip], batch, padded_shapes, **options))

    monkeypatch.setattr(FrozenAutoencoder, "encode", functools.partialmethod(counted, stop=3))
    with pytest.raises(KeyboardInterrupt):
        encoding.encode_dataset(chain.autoencoder, chain.dataset, out, options)
    assert not (tmp_path / "latents").exists()
    encoded.clear()
    monkeypatch.setattr(FrozenAutoencoder, "encode", counted)
    assert encoding.encode_dataset(chain.autoencoder, chain.dataset, out, options)
    assert len(encoded) == 6 - 2
    found, wanted = LatentCache(tmp_path / "latents"), LatentCache(chain.latents)
    assert found.ids(range(6)) == wanted.ids(range(6))
    for i in range(len(wanted)):
        np.testing.assert_allclose(found[i], wanted[i], atol=2e-3)


def test_shares_of_two_machines_make_the_cache_of_one(chain, tmp_path, capsys):  # noqa: F811
    for number in range(2):
        options = EncodeOptions(share=ShardSpec(number, 2), clips_per_shard=2)
        done = encoding.encode_dataset(chain.autoencoder, chain.dataset, tmp_path / "l", options)
        assert done == (number == 1) == (tmp_path / "l").exists()
    assert load_autoencoder(tmp_path / "l").fingerprint == LatentCache(tmp_path / "l").info.fingerprint
    assert encode(chain, tmp_path / "l") == 0  # complete: kept
    for i, latent in enumerate(LatentCache(chain.latents)):
        np.testing.assert_allclose(LatentCache(tmp_path / "l")[i], latent, atol=2e-3)


def test_an_interrupted_build_leaves_nothing_and_can_be_given_again(chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    from sora_jax.data.building import build

    prepare = build.prepare

    def interrupted(mix, config, unit):
        if unit.entry == 3:
            raise KeyboardInterrupt
        return prepare(mix, config, unit)

    options = [*build_options(chain.clips, tmp_path / "dataset"), "--workers=0"]
    monkeypatch.setattr(build, "prepare", interrupted)
    assert run(*options) == 130
    assert "interrupted" in capsys.readouterr().err and not (tmp_path / "dataset").exists()
    monkeypatch.setattr(build, "prepare", prepare)
    assert run(*options) == 0
    assert len(Dataset(tmp_path / "dataset")) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["dataset"]
