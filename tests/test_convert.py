"""Weights of others: the same outputs, losses and gradients as their own networks, and back to the same bits."""

import dataclasses
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import relative_error
from fixtures_models import PACKINGS, Golden, Images, dit_weights, write_folder, write_official
from fixtures_runs import one_device, run
from peers.tensors import uniform

from sora_jax.config import load
from sora_jax.convert import command, wan
from sora_jax.convert import dit as dits
from sora_jax.convert.links import write_tree
from sora_jax.convert.record import read_record
from sora_jax.convert.tensors import WEIGHTS, read_tensors, write_tensors
from sora_jax.convert.vae import read_vae, write_vae
from sora_jax.data.viewing.write import save_png
from sora_jax.diffusion.guidance import GuidanceConfig, TokenLayout, guided
from sora_jax.diffusion.loss import Corruption, LossSpec, denoising_loss
from sora_jax.diffusion.process import process_named
from sora_jax.errors import UserError
from sora_jax.files import write_json
from sora_jax.generate.run import load_run
from sora_jax.kinds import run_config
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.autoencoder_kl import KLConfig, autoencoder_specs, decode, encode
from sora_jax.models.autoencoder_wan import WanConfig
from sora_jax.models.first_stage import encode as encode_first_stage
from sora_jax.models.transformer import SIZES, denoise, denoiser_specs
from sora_jax.nn.pack import drop_captions
from sora_jax.nn.params import abstract, count
from sora_jax.nn.positions import sincos_table
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.frozen import FrozenAutoencoder, load_autoencoder

ROOT = Path(__file__).parents[1]
NEAR = 2e-5


@functools.cache
def golden(name: str) -> Golden:
    return Golden(name)


def refused(function, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ autoencoder


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    """vae_folder(name, **changes of config.json)"""

    def make(name: str, **changes) -> Path:
        folder = tmp_path_factory.mktemp(name)
        return write_folder(folder, golden(name), "AutoencoderKL", golden(name).weights, **changes)

    return make


@pytest.mark.parametrize("name", ["kl4", "kl16"])
def test_the_autoencoder_is_that_of_diffusers(name, vae_folder):
    vae, wanted = read_vae(vae_folder(name)), golden(name)
    picture, latent = (np.moveaxis(wanted[key], 1, -1)[:, None] for key in ("picture", "latent"))
    assert picture.shape[2] != picture.shape[3]
    config = dataclasses.replace(vae.config, dtype="float32", remat=False)
    mean, logvar = jax.jit(lambda x: encode(vae.params, config, x))(picture)
    decoded = jax.jit(lambda z: decode(vae.params, config, z))(latent)
    for found, key in ((mean, "mean"), (logvar, "logvar"), (decoded, "decoded")):
        assert relative_error(np.moveaxis(found[:, 0], -1, 1), wanted[key]) < NEAR, key


def test_full_size_has_the_parameters_that_the_peer_counts():
    for config in (KLConfig(), KLConfig(latent_channels=16, quant=False)):
        name = f"kl{config.latent_channels}"
        assert count(autoencoder_specs(config)) == golden("parameters").meta["parameters"][name]


STATISTICS = [  # in config.json, mean, deviation
    ({"scaling_factor": 0.18215}, 0.0, 1 / 0.18215),
    ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, 0.0609, 1 / 1.5305),
    ({"latents_mean": [1, 2, 3, 4], "latents_std": [4, 3, 2, 1], "scaling_factor": 0.5}, [1, 2, 3, 4], [8, 6, 4, 2]),
]


@pytest.mark.parametrize("said, mean, std", STATISTICS)
def test_statistics_of_latents_are_those_of_the_folder_and_go_back(vae_folder, tmp_path, said, mean, std):
    vae = read_vae(vae_folder("kl4", **said))
    np.testing.assert_allclose(vae.mean_C, np.broadcast_to(mean, 4), rtol=1e-6)
    np.testing.assert_allclose(vae.std_C, np.broadcast_to(std, 4), rtol=1e-6)
    write_vae(vae, tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    if "latents_mean" not in said:
        assert {name: record[name] for name in said} == said  # 0.18215, not the float32 nearest to it
    again = read_vae(tmp_path)
    assert again.config == vae.config and again.fingerprint == vae.fingerprint


PUBLISHED = {  # fields of config.json as released, beside the sizes; golden of that shape, mean and deviation
    "Stable Diffusion 1": ({"sample_size": 512}, "kl4", 0.0, 1 / 0.18215),
    "Stable Diffusion 2": ({"sample_size": 768}, "kl4", 0.0, 1 / 0.18215),
    "SDXL": ({"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}, "kl4", 0.0, 1 / 0.13025),
    "SDXL, later": (
        {
            "scaling_factor": 0.13025,
            "shift_factor": None,
            "latents_mean": None,
            "latents_std": None,
            "use_quant_conv": True,
            "use_post_quant_conv": True,
            "mid_block_add_attention": True,
        },
        "kl4",
        0.0,
        1 / 0.13025,
    ),
    "SD3": (
        {
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "latents_mean": None,
            "latents_std": None,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "force_upcast": True,
        },
        "kl16",
        0.0609,
        1 / 1.5305,
    ),
    "FLUX.1": (
        {
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "latents_mean": None,
            "latents_std": None,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": True,
        },
        "kl16",
        0.1159,
        1 / 0.3611,
    ),
}


@pytest.mark.parametrize("said, name, mean, std", PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_flavours_are_read_from_what_their_files_say(tmp_path, said, name, mean, std):
    levels, config = 3, golden(name).meta["config"]
    sizes = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
    record = {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **{size: config[size] for size in sizes},
        **said,
    }
    write_json(tmp_path / "config.json", record)
    write_tensors(tmp_path / f"{WEIGHTS}.safetensors", golden(name).weights)
    vae = read_vae(tmp_path)
    assert (vae.config.latent_channels, vae.config.quant) == {"kl4": (4, True), "kl16": (16, False)}[name]
    np.testing.assert_allclose(vae.mean_C, np.full(vae.config.latent_channels, mean), rtol=1e-6)
    np.testing.assert_allclose(vae.std_C, np.full(vae.config.latent_channels, std), rtol=1e-6)


@pytest.mark.parametrize("name", ["kl4", "kl16"])
def test_an_autoencoder_goes_back_to_the_same_bits_and_config(name, vae_folder, tmp_path):
    write_vae(read_vae(vae_folder(name)), tmp_path)
    found = read_tensors(tmp_path)
    assert found.keys() == golden(name).weights.keys()
    for key, x in found.items():
        np.testing.assert_array_equal(x, golden(name).weights[key])
    said, wanted = json.loads((tmp_path / "config.json").read_text()), golden(name).meta["config"]
    assert {key: wanted[key] for key in said if key in wanted} == {key: x for key, x in said.items() if key in wanted}


def test_attention_may_have_the_names_it_had_before(tmp_path):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, x in golden("kl4").weights.items():
        module = name.rpartition(".")[0].partition("attentions.0.")[2]
        old[name.replace(module, new[module]) if module in new else name] = x
    assert any(".query." in name for name in old)
    vae = read_vae(write_folder(tmp_path, golden("kl4"), "AutoencoderKL", old))
    assert sum(np.asarray(x).size for x in jax.tree.leaves(vae.params)) == sum(x.size for x in old.values())


@pytest.mark.parametrize(
    "change", [{"act_fn": "gelu"}, {"mid_block_add_attention": False}, {"use_quant_conv": False}, {"in_channels": 4}]
)
def test_another_architecture_of_an_autoencoder_is_refused(vae_folder, change):
    name = "use_post_quant_conv" if "use_quant_conv" in change else next(iter(change))
    assert f"in its config.json {name} is" in refused(read_vae, vae_folder("kl4", **change))


NUMBERS = [  # field, what it is, what it must be
    ("scaling_factor", 0, "a positive finite number"),
    ("scaling_factor", -0.5, "a positive finite number"),
    ("scaling_factor", None, "a positive finite number"),
    ("scaling_factor", 1e-300, "a positive finite number"),
    pytest.param("scaling_factor", 10**400, "a positive finite number", id="larger than any float"),
    ("scaling_factor", float("nan"), "a positive finite number"),
    ("shift_factor", "x", "a finite number"),
    ("shift_factor", float("inf"), "a finite number"),
    ("latents_mean", [1, 2, 3], "a list of 4 finite numbers"),
    ("latents_mean", [1, 2, 3, None], "a list of 4 finite numbers"),
    ("latents_std", [1, 2, 3, 0], "a list of 4 positive finite numbers"),
    ("norm_num_groups", None, "a positive whole number"),
    ("norm_num_groups", 5, "a divisor of all block_out_channels"),
    ("latent_channels", None, "a positive whole number"),
    ("latent_channels", 4.0, "a positive whole number"),
    ("layers_per_block", 0, "a positive whole number"),
    ("block_out_channels", [], "a list of positive whole numbers"),
    ("block_out_channels", 32, "a list of positive whole numbers"),
    ("use_quant_conv", None, "true or false"),
    ("down_block_types", None, '["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"]'),
    ("_class_name", "VQModel", '"AutoencoderKL" or "AutoencoderKLWan"'),
]


@pytest.mark.parametrize("name, value, allowed", NUMBERS)
def test_a_field_of_an_autoencoder_that_cannot_be_is_named(vae_folder, name, value, allowed):
    folder = vae_folder("kl4", **{name: value})
    expected = f"--weights is {str(folder)!r}; in its config.json {name} is {json.dumps(value)}; it must be {allowed}"
    assert refused(read_vae, folder) == expected


def test_a_field_that_an_autoencoder_lacks_is_named(vae_folder):
    folder = vae_folder("kl4")
    record = json.loads((folder / "config.json").read_text())
    del record["block_out_channels"]
    (folder / "config.json").write_text(json.dumps(record))
    assert "block_out_channels is missing; it must be a list of positive" in refused(read_vae, folder)
    (folder / "config.json").write_text(json.dumps([record]))
    assert refused(read_vae, folder) == f"{str(folder / 'config.json')!r} holds no fields; it must be a JSON object"


# ---------------------------------------------------------------------------------------- autoencoder of Wan

# Published with Wan 2.1; a model sees (z - mean) / deviation.
WAN_MEAN = [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508]
WAN_MEAN += [0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921]
WAN_STD = [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743]
WAN_STD += [3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160]


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory):
    """wan_folder(name, **changes of config.json)"""

    def make(name: str, **changes) -> Path:
        folder = tmp_path_factory.mktemp(name)
        channels = golden(name).meta["config"]["z_dim"]
        statistics = {"latents_mean": WAN_MEAN[:channels], "latents_std": WAN_STD[:channels]}
        return write_folder(folder, golden(name), wan.CLASS, golden(name).weights, **statistics | changes)

    return make


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_wan_goes_back_to_the_same_bits_and_config(name, wan_folder, tmp_path):
    vae, original = read_vae(wan_folder(name)), json.loads((wan_folder(name) / "config.json").read_text())
    write_vae(vae, tmp_path)
    found, again = read_tensors(tmp_path), read_vae(tmp_path)
    assert found.keys() == golden(name).weights.keys()
    for key, x in found.items():
        np.testing.assert_array_equal(x, golden(name).weights[key])
    said = json.loads((tmp_path / "config.json").read_text())
    assert {key: x for key, x in said.items() if not key.startswith("latents")} == {
        key: x for key, x in original.items() if not key.startswith("latents")
    }
    assert again.config == vae.config and again.fingerprint == vae.fingerprint
    channels = vae.config.latent_channels
    for statistic, published in ((vae.mean_C, WAN_MEAN), (vae.std_C, WAN_STD)):
        np.testing.assert_allclose(statistic, published[:channels], rtol=1e-6)


def test_a_release_of_wan_is_the_default_config(tmp_path):
    record = {"_class_name": wan.CLASS, "base_dim": 96, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    record |= {"attn_scales": [], "temperal_downsample": [False, True, True], "dropout": 0.0}
    write_json(tmp_path / "config.json", record | {"latents_mean": WAN_MEAN, "latents_std": WAN_STD})
    read = read_record(tmp_path / "config.json")
    assert wan.read_config(read) == WanConfig(remat=True)
    assert [len(x) for x in wan.read_statistics(read, 16)] == [16, 16]


def test_a_first_stage_of_wan_is_converted_both_ways_and_encodes_normalised_latents(wan_folder, tmp_path):
    weights, out, back = wan_folder("wan22"), tmp_path / "wan22", tmp_path / "back"
    assert run("convert", "--from=diffusers-vae", f"--weights={weights}", f"--out={out}") == 0
    assert run("convert", "--to=diffusers-vae", f"--workdir={out}", f"--out={back}") == 0
    found = load_autoencoder(out)
    assert found.fingerprint == read_vae(weights).fingerprint == read_vae(back).fingerprint
    clip = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), np.uint8)
    (latent,) = found.encode([clip])
    mean, _ = encode_first_stage(found.params, found.config, jnp.asarray(clip[None] / 127.5 - 1, jnp.float32))
    np.testing.assert_allclose(
        latent, (np.asarray(mean[0]) - np.float32(WAN_MEAN[:6])) / np.float32(WAN_STD[:6]), atol=1e-5
    )
    config = run_config(json.loads((out / "config.json").read_text()))
    assert config == command.autoencoder_run(found.config) and config.crop == (17, 256, 256)


WAN_FIELDS = [  # field, what it is, what it must be
    ("temperal_downsample", [True, True], "a list of 3, each true or false"),
    ("temperal_downsample", [0, 1, 1], "a list of 3, each true or false"),
    ("temperal_downsample", None, "a list of 3, each true or false"),
    ("attn_scales", [1.0], "[]"),
    ("in_channels", 12, "3"),
    ("patch_size", 0, "a positive whole number"),
    ("latents_mean", None, "a list of 4 finite numbers"),
    ("latents_std", [1, 2, 3, 0], "a list of 4 positive finite numbers"),
    ("dim_mult", [], "a list of positive whole numbers"),
    ("is_residual", 1.5, "true or false"),
]


@pytest.mark.parametrize("name, value, allowed", WAN_FIELDS)
def test_a_field_of_wan_that_cannot_be_is_named(wan_folder, name, value, allowed):
    folder = wan_folder("wan21", **{name: value})
    expected = f"--weights is {str(folder)!r}; in its config.json {name} is {json.dumps(value)}; it must be {allowed}"
    assert refused(read_vae, folder) == expected


def test_an_autoencoder_of_the_house_has_no_folder(tmp_path):
    own = AutoencoderConfig()
    found = FrozenAutoencoder(own, {}, np.zeros(16, np.float32), np.ones(16, np.float32))
    assert "must have a KLConfig or WanConfig for that format, and has AutoencoderConfig" in refused(
        write_vae, found, tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------- DiT


def read(name: str, folder: Path) -> dits.Network:
    if name == "dit_official":
        return dits.read_dit(write_official(folder / "dit.safetensors", golden(name)), heads=2)
    return dits.read_diffusers(write_folder(folder, golden(name), dits.CLASSES[0], dit_weights(golden(name))))


@pytest.fixture(scope="module", params=["dit_official", "dit_diffusers"])
def network(request, tmp_path_factory):
    """(golden, network, links) of one of the two formats."""
    found = read(request.param, tmp_path_factory.mktemp(request.param))
    found = dataclasses.replace(found, config=dataclasses.replace(found.config, dtype="float32"))
    links = dits.official_links if request.param == "dit_official" else dits.diffusers_links
    return golden(request.param), found, links(found.config)


@pytest.mark.parametrize("layout", PACKINGS)
def test_a_forward_pass_is_that_of_the_peer(network, layout):
    wanted, found, _ = network
    images = Images(layout)
    x_BLP = images.of(wanted["x"]).tokens_BLP
    out = jax.jit(lambda p, x, t: denoise(p, found.config, images.pack, x, t))(found.params, x_BLP, images.times_BR)
    assert relative_error(images.back(out), wanted["out"]) < NEAR


@pytest.mark.parametrize("channels", [3, 4])
def test_guidance_is_that_of_the_peers(network, channels):
    wanted, found, _ = network
    images = Images("together")
    nothing = drop_captions(images.pack, jnp.ones_like(images.pack.clip_ids_BS, bool))
    rule = guided(
        GuidanceConfig(4.0, channels),
        *(functools.partial(denoise, found.params, found.config, each) for each in (images.pack, nothing)),
        jnp.full(images.pack.clip_ids_BS.shape, 4.0),
        TokenLayout(images.pack.segments_BL, images.pack.rows_BL, 4),
    )
    out = jax.jit(rule)(images.of(wanted["x"]).tokens_BLP, images.times_BR)
    assert relative_error(images.back(out), wanted[f"guided_{channels}"]) < NEAR


def loss(params, config, images: Images, x0, eps, chosen=(0, 1, 2)):
    chosen_BS = jnp.isin(images.pack.clip_ids_BS, jnp.array(chosen) + 1) & (images.pack.clip_ids_BS > 0)
    slots_BL = jnp.maximum(images.pack.segments_BL - 1, 0)
    weight_BL = jnp.take_along_axis(chosen_BS, slots_BL, 1) & (images.pack.segments_BL > 0)
    return denoising_loss(
        LossSpec(process_named("vp_linear"), "eps", learned_variance=True),
        functools.partial(denoise, params, config, images.pack),
        Corruption(images.of(x0).tokens_BLP, images.of(eps).tokens_BLP, images.times_BR, images.pack.rows_BL),
        weight_BL.astype(jnp.float32),
    )


@pytest.mark.parametrize("layout", PACKINGS)
def test_the_terms_of_the_loss_are_those_of_the_peer(network, layout):
    wanted, found, _ = network
    images = Images(layout)
    terms = jax.jit(lambda p, only: loss(p, found.config, images, wanted["x0"], wanted["eps"], only))
    for image in range(3):
        sums = terms(found.params, jnp.array([image]))
        for term, key in ((sums.mse, "mse"), (sums.vlb, "bits")):
            assert abs(term / sums.weight - wanted[key][image]) < NEAR * abs(wanted[key][image]), (image, key)


def test_gradients_of_the_loss_are_those_of_the_peer(network):
    wanted, found, links = network
    images = Images("together")

    def mean(params):
        sums = loss(params, found.config, images, wanted["x0"], wanted["eps"])
        return sums.loss / sums.weight

    gradients = write_tree(links, jax.jit(jax.grad(mean))(found.params))
    peers = wanted.gradients()
    assert gradients.keys() == peers.keys()
    largest = max(map(np.linalg.norm, peers.values()))
    for name, x in peers.items():  # that of the keys' bias is nothing but rounding: softmax does not see it
        error = np.linalg.norm(gradients[name] - x)
        assert error < NEAR * max(np.linalg.norm(x), 1e-2 * largest), name


def test_a_dit_goes_back_to_the_same_bits(network, tmp_path):
    wanted, found, _ = network
    dits.write_dit(found, tmp_path / "dit.safetensors")
    dits.write_diffusers(found, tmp_path / "folder")
    official, folder = read_tensors(tmp_path / "dit.safetensors"), read_tensors(tmp_path / "folder")
    weights = dit_weights(wanted)
    for name, x in weights.items():
        np.testing.assert_array_equal((official if "pos_embed" in weights else folder)[name], x)
    assert len(official if "pos_embed" in weights else folder) == len(weights)
    again = dits.read_dit(tmp_path / "dit.safetensors", heads=2), dits.read_diffusers(tmp_path / "folder")
    for other in again:
        assert other.side == found.side == 8
        assert dataclasses.replace(other.config, dtype="float32") == found.config
        chex.assert_trees_all_equal(other.params, found.params)


def test_the_table_of_positions_is_that_of_the_model():
    coords = np.indices((1, 6, 6)).reshape(3, -1).T[None].astype(np.float32)
    table = sincos_table(jnp.asarray(coords), 24, axes="xy")[0]
    np.testing.assert_allclose(dits.position_table(24, 6), table, atol=2e-6)


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    weights = dit_weights(golden("dit_official"))
    del weights["blocks.1.mlp.fc2.bias"], weights["t_embedder.mlp.0.weight"]
    weights |= {"blocks.0.mlp.fc1.bias": weights["blocks.0.mlp.fc1.bias"][:-1], "extra.weight": np.zeros((2, 2))}
    write_tensors(tmp_path / "dit.safetensors", weights)
    said = refused(dits.read_dit, tmp_path / "dit.safetensors", heads=2)
    assert "missing: t_embedder.mlp.0.weight, blocks.1.mlp.fc2.bias" in said
    assert "unknown: extra.weight" in said and "blocks.0.mlp.fc1.bias (95,) instead of (96,)" in said


def test_other_positions_are_refused(tmp_path):
    table = golden("dit_official")["pos_embed"] + np.float32(1e-3)
    path = write_official(tmp_path / "dit.safetensors", golden("dit_official"), pos_embed=table)
    assert "differs by 0.001 from DiT's position table" in refused(dits.read_dit, path, heads=2)
    path = write_official(tmp_path / "dit.safetensors", golden("dit_official"), pos_embed=table[:, :-1])
    assert "pos_embed must have shape" in refused(dits.read_dit, path, heads=2)


WHOLE = "a positive whole number"


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("sample_size", None, WHOLE),
        ("sample_size", 7, "a multiple of patch_size = 2"),
        ("num_layers", None, WHOLE),
        ("num_layers", "2", WHOLE),
        ("num_layers", True, WHOLE),
        ("num_attention_heads", None, WHOLE),
        ("num_attention_heads", 0, WHOLE),
        ("num_attention_heads", -2, WHOLE),
        ("attention_head_dim", 11, "even"),
        ("patch_size", None, WHOLE),
        ("num_embeds_ada_norm", None, WHOLE),
        ("out_channels", 5, "in_channels = 4, or twice that"),
        ("norm_type", None, '"ada_norm_zero"'),
        ("_class_name", "AutoencoderKL", '"DiTTransformer2DModel" or "Transformer2DModel"'),
    ],
)
def test_a_field_of_a_folder_that_cannot_be_is_named(tmp_path, name, value, allowed):
    folder = write_folder(tmp_path, golden("dit_diffusers"), dits.CLASSES[0], {}, **{name: value})
    expected = f"--weights is {str(folder)!r}; in its config.json {name} is {json.dumps(value)}; it must be {allowed}"
    assert refused(dits.read_diffusers, folder) == expected


def test_a_table_of_another_size_than_the_folder_says_is_refused(tmp_path):
    weights = {dits.TABLE: np.zeros((1, 9, 24), np.float32)}
    folder = write_folder(tmp_path, golden("dit_diffusers"), dits.CLASSES[0], weights)
    assert f"{dits.TABLE} (1, 9, 24) instead of (1, 16, 24)" in refused(dits.read_diffusers, folder)


COPY = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"


@pytest.mark.parametrize("lost", [False, True])
def test_copies_that_differ_are_refused_by_name(tmp_path, lost):
    weights = dit_weights(golden("dit_diffusers"))
    copy = weights.pop(COPY)
    weights |= {} if lost else {COPY: copy + np.float32(1e-7) * (copy == copy.max())}
    folder = write_folder(tmp_path, golden("dit_diffusers"), dits.CLASSES[0], weights)
    assert refused(dits.read_diffusers, folder).endswith(COPY)


def test_heads_are_asked_for_where_shapes_do_not_tell(tmp_path):
    path = write_official(tmp_path / "dit.safetensors", golden("dit_official"))
    assert "--heads is not given" in refused(dits.read_dit, path)


def test_the_published_sizes_are_told_by_their_shapes():
    for depth, width, heads in SIZES.values():
        config = dataclasses.replace(dits.DIT, depth=depth, width=width, heads=heads, patch=(1, 4, 4), classes=7)
        specs = abstract(denoiser_specs(config))
        zeros = jax.tree.map(lambda spec: np.broadcast_to(np.float32(0), spec.shape), specs)
        names = dits.official_links(dataclasses.replace(config, depth=1))
        tensors = write_tree(names, zeros) | {f"blocks.{depth - 1}.attn.qkv.bias": np.zeros(3 * width)}
        assert dits._infer(tensors, dits.DIT, None, "file") == config


FOREIGN = [("rotary", True), ("qk_norm", True), ("step_times", False), ("patch", (2, 2, 2))]


@pytest.mark.parametrize("name, value", FOREIGN)
def test_a_model_that_the_formats_cannot_hold_is_refused(network, tmp_path, name, value):
    _, found, _ = network
    other = dataclasses.replace(found, config=dataclasses.replace(found.config, **{name: value}))
    for write, out in ((dits.write_dit, tmp_path / "x.safetensors"), (dits.write_diffusers, tmp_path / "x")):
        assert f"config.model.{name} is" in refused(write, other, out)
        assert not out.exists()


# ------------------------------------------------------------------------------------------------------ files


def test_half_precision_is_widened_and_parts_are_put_together(tmp_path):
    from safetensors.flax import save_file

    x = uniform("x", (3, 4))
    save_file({"a": jnp.asarray(x, jnp.bfloat16)}, tmp_path / "one.safetensors")
    save_file({"b": jnp.asarray(x, jnp.float16)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps(index))
    found = read_tensors(tmp_path)
    assert {name: x.dtype for name, x in found.items()} == {"a": np.float32, "b": np.float32}
    np.testing.assert_array_equal(found["b"], x.astype(np.float16))
    np.testing.assert_allclose(found["a"], x, rtol=2**-8)
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors" in refused(read_tensors, tmp_path)
    for files in (None, ["one.safetensors"], {"a": 1}):
        (tmp_path / f"{WEIGHTS}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        assert f"weight_map is {json.dumps(files)}; it must be an object" in refused(read_tensors, tmp_path)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("x.safetensors", b"", "cannot be read"),
        ("x.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00damaged!", "cannot be read"),
        ("x.npz", b"", "must end in .safetensors"),
        ("x.pt", b"", "torch must be installed"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path, monkeypatch, name, content, said):
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    (tmp_path / name).write_bytes(content)
    assert said in refused(read_tensors, tmp_path / name)
    assert "it must be a file or folder that exists" in refused(read_tensors, tmp_path / "nothing")
    assert f"it must hold {WEIGHTS}.safetensors" in refused(read_tensors, tmp_path)


# ---------------------------------------------------------------------------------------------------- command


def test_the_recipes_of_converted_runs_are_those_of_the_configs():
    config = run_config(load(f"{ROOT / 'configs' / 'dit.py'}:XL/2,512"))
    assert command.denoiser_run(dits.Network(config.model, {}, 64)) == config
    for variant, model in (("kl4", KLConfig(remat=True)), ("kl16", KLConfig(16, quant=False, remat=True))):
        config = run_config(load(f"{ROOT / 'configs' / 'autoencoder.py'}:{variant}"))
        assert command.autoencoder_run(model) == config


@pytest.fixture(scope="module")
def runs(tmp_path_factory, vae_folder):
    """Folders with an autoencoder run, and one of a DiT that uses it."""
    folder = tmp_path_factory.mktemp("runs")
    assert run("convert", "--from=diffusers-vae", f"--weights={vae_folder('kl4')}", f"--out={folder / 'kl4'}") == 0
    path = write_official(folder / "dit.safetensors", golden("dit_official"))
    options = [f"--weights={path}", f"--autoencoder={folder / 'kl4'}", "--heads=2", f"--out={folder / 'dit'}"]
    assert run("convert", "--from=dit", *options) == 0
    return folder


def test_a_converted_run_samples(runs, tmp_path):
    options = ["--class=1,9", "--size=32", "--steps=3", f"--out={tmp_path / 'grid.png'}"]
    assert run("sample", f"--workdir={runs / 'dit'}", *options) == 0
    assert (tmp_path / "grid.png").exists()


def test_the_example_of_inversion_gives_the_picture_back(runs, tmp_path):
    """The block of docs/sampling.md, as it stands but for the run, the picture and its class."""
    page = (ROOT / "docs" / "sampling.md").read_text()
    (block,) = (
        block for block in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "invert" in block
    )
    picture = tmp_path / "picture.png"
    save_png(picture, np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    options = [f"--weights={runs / 'dit.safetensors'}", f"--autoencoder={runs / 'kl4'}", "--heads=2"]
    assert run("convert", "--from=sit", *options, f"--out={tmp_path / 'sit'}") == 0
    for there, here in (("runs/sit", str(tmp_path / "sit")), ("picture.png", str(picture)), ("207", "7")):
        assert there in block
        block = block.replace(there, here)
    names: dict = {}
    with one_device():
        exec(block, names)
    wanted = np.asarray(names["pack"].tokens_BLP)
    assert np.abs(names["noise_BLP"] - wanted).max() > 0.3
    np.testing.assert_allclose(names["again_BLP"], wanted, atol=0.02 * np.abs(wanted).max())


CONFIG = """
import json
from sora_jax.config import from_dict, to_config_dict
from sora_jax.train.denoiser import DenoiserRun

def get_config(variant=""):
    return to_config_dict(from_dict(DenoiserRun, json.load(open({path!r}))))
"""


def test_a_converted_run_trains_on_from_its_weights(runs, tmp_path):
    rows = ["file,label"]
    (tmp_path / "pictures").mkdir()
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        save_png(tmp_path / "pictures" / f"{number}.png", pixels)
        rows.append(f"{number}.png,{number % 2}")
    (tmp_path / "pictures" / "captions.csv").write_text("\n".join(rows))
    data, latents, dit = (tmp_path / name for name in ("data", "latents", "dit"))
    assert (
        run("data", "build", f"--path={tmp_path / 'pictures'}", f"--out={data}", "--multiple=8", "--holdout=0.2") == 0
    )
    assert run("data", "encode", f"--autoencoder={runs / 'kl4'}", f"--data={data}", f"--out={latents}") == 0
    shutil.copytree(runs / "dit", dit)
    (tmp_path / "config.py").write_text(CONFIG.format(path=str(dit / "config.json")))
    options = [f"--workdir={dit}", f"--config.latents={latents}", "--config.loop.steps=2", "--config.loop.log_every=1"]
    assert run("train", f"--config={tmp_path / 'config.py'}", *options) == 0
    with Checkpoints(dit / "checkpoints") as checkpoints:
        assert checkpoints.latest() == 2
    with one_device():
        before, after = load_run(runs / "dit"), load_run(dit)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before.params, after.params)
    assert 0 < max(jax.tree.leaves(moved)) < 1e-6  # two steps of at most 1e-4, of which the average takes 1e-4


def test_a_converted_run_goes_back_and_is_the_same(runs, tmp_path, vae_folder):
    assert run("convert", "--to=dit", f"--workdir={runs / 'dit'}", f"--out={tmp_path / 'x.safetensors'}") == 0
    for name, x in read_tensors(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(x, dit_weights(golden("dit_official"))[name])
    assert run("convert", "--to=diffusers-dit", f"--workdir={runs / 'dit'}", f"--out={tmp_path / 'folder'}") == 0
    assert dits.read_diffusers(tmp_path / "folder").side == 8
    for name in ("kl4", "dit"):  # a denoiser's own autoencoder can be written, too
        out = tmp_path / f"vae-{name}"
        assert run("convert", "--to=diffusers-vae", f"--workdir={runs / name}", f"--out={out}") == 0
        assert read_vae(out).fingerprint == load_autoencoder(runs / "kl4").fingerprint


def test_the_folder_of_a_pipeline_is_taken_apart(tmp_path, vae_folder):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    write_folder(tmp_path / "pipeline" / "vae", golden("kl4"), "AutoencoderKL", golden("kl4").weights)
    weights = dit_weights(golden("dit_diffusers"))
    write_folder(tmp_path / "pipeline" / "transformer", golden("dit_diffusers"), dits.CLASSES[1], weights)
    for kind in ("diffusers-vae", "diffusers-dit"):
        assert run("convert", f"--from={kind}", f"--weights={tmp_path / 'pipeline'}", f"--out={tmp_path / kind}") == 0
    assert load_autoencoder(tmp_path / "diffusers-vae").config == read_vae(vae_folder("kl4")).config


@pytest.mark.parametrize(
    "options, said",
    [
        (["--from=dit", "--out=x"], "--weights is not given"),
        (["--to=dit", "--out=x"], "--workdir is not given"),
        (["--to=dit", "--out=x", "--workdir=y", "--heads=2"], "--heads is '2'; it must not be given with --to"),
        (["--from=dit", "--weights=x", "--out=y", "--heads=0"], "--heads is 0; it must be positive"),
        (["--from=dit", "--weights=x", "--out=y", "--heads=-2"], "--heads is -2; it must be positive"),
        (["--from=keras", "--weights=x", "--out=y"], "--from is 'keras'; allowed: 'dit'"),
        (["--from=diffusers-dit", "--weights=x", "--out=y", "--heads=2"], "--heads is 2; with --from=diffusers-dit it"),
        (
            ["--from=diffusers-vae", "--weights=x", "--out=y", "--autoencoder=z"],
            "with --from=diffusers-vae it must not",
        ),
        (["--from=diffusers-vae", "--weights=x", "--out=y"], "it must hold config.json"),
        (["--to=dit", "--workdir=x", "--out=y"], "there is no config.json"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(options, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run("convert", *options) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_autoencoder_of_other_channels_is_refused(tmp_path, vae_folder, capsys):
    weights = f"--weights={vae_folder('kl16')}"
    assert run("convert", "--from=diffusers-vae", weights, f"--out={tmp_path / 'kl16'}") == 0
    path = write_official(tmp_path / "dit.safetensors", golden("dit_official"))
    options = [f"--weights={path}", f"--autoencoder={tmp_path / 'kl16'}", "--heads=2", f"--out={tmp_path / 'dit'}"]
    assert run("convert", "--from=dit", *options) == 2
    assert "its latents must have 4 channels, and have 16" in capsys.readouterr().err
    assert not (tmp_path / "dit").exists()
