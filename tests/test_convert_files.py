"""Files of weights as they are found: half precision, training checkpoints, prefixes, parts, variants, NaNs."""

import argparse
import json

import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_models import Golden, dit_weights, write_folder, write_official
from fixtures_runs import run

from sora_jax.convert import dit as dits
from sora_jax.convert import tensors
from sora_jax.convert.tensors import WEIGHTS, read_tensors, write_tensors
from sora_jax.convert.vae import read_vae
from sora_jax.errors import UserError


@pytest.fixture(scope="module")
def weights():
    return dit_weights(Golden("dit_official"))


def write_half(path, weights, dtype):
    from safetensors.flax import save_file

    save_file({name: jnp.asarray(x, dtype) for name, x in weights.items()}, path)
    return path


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, x in found.items():
        np.testing.assert_array_equal(x, wanted[name], err_msg=name)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_converted_and_its_rounding_is_no_learned_table(weights, tmp_path, dtype):
    path = write_half(tmp_path / "dit.safetensors", weights, dtype)
    found = dits.read_dit(path, heads=2)
    np.testing.assert_array_equal(found.params["classes"], read_tensors(path)["y_embedder.embedding_table.weight"])
    # Neither a table that is learned, by ever so little more than the rounding, nor float32 that is off as much.
    error = float(jnp.finfo(dtype).eps) / 4
    write_half(path, weights | {"pos_embed": weights["pos_embed"] + 6 * error}, dtype)
    with pytest.raises(UserError, match="pos_embed .* differs by .* from DiT's position table"):
        dits.read_dit(path, heads=2)
    write_tensors(path, weights | {"pos_embed": weights["pos_embed"] + np.float32(error / 2)})
    with pytest.raises(UserError, match="pos_embed .* differs by .* from DiT's position table"):
        dits.read_dit(path, heads=2)


PREFIXES = {
    "module.": ["the prefix 'module.' was left out of the names of all tensors"],
    "_orig_mod.": ["'_orig_mod.' was left out of the names of tensors"],
    "module._orig_mod.": [
        "'_orig_mod.' was left out of the names of tensors",
        "the prefix 'module.' was left out of the names of all tensors",
    ],
    "model.": ["the prefix 'model.' was left out of the names of all tensors"],
    "": [],
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_all_names_are_left_out_and_told(weights, tmp_path, prefix):
    notes = []
    write_tensors(tmp_path / "dit.safetensors", {f"{prefix}{name}": x for name, x in weights.items()})
    assert_same(read_tensors(tmp_path / "dit.safetensors", notes), weights)
    assert notes == PREFIXES[prefix]


def test_blocks_that_were_compiled_one_by_one_are_read(weights, tmp_path):
    renamed = {name.replace("blocks.1.", "blocks.1._orig_mod."): x for name, x in weights.items()}
    write_tensors(tmp_path / "dit.safetensors", renamed)
    assert_same(read_tensors(tmp_path / "dit.safetensors"), weights)


def test_a_prefix_of_some_names_stays(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"module.a": np.ones(1, np.float32), "b": np.ones(1, np.float32)})
    assert sorted(read_tensors(tmp_path / "x.safetensors")) == ["b", "module.a"]


def test_nestings_are_opened_and_told():
    notes, inner = [], {"x": 1}
    assert tensors._without_nestings({"model": {}, "ema": {"state_dict": inner}, "opt": {}}, notes) is inner
    assert notes == [
        "the tensors of 'ema' in the checkpoint were read, and not of 'model'",
        "the tensors of 'state_dict' in the checkpoint were read",
    ]


@pytest.mark.parametrize("half", [False, True])
def test_the_checkpoint_of_the_training_code_gives_its_average(weights, tmp_path, capsys, half):
    """Write that of facebookresearch/DiT and willisma/SiT: model, ema, opt, and args, which is a Namespace."""
    torch = pytest.importorskip("torch", reason="needs sora_jax[text]")
    averaged = {f"module.{name}": torch.tensor(x) for name, x in weights.items()}
    averaged = {name: x.half() for name, x in averaged.items()} if half else averaged
    args = argparse.Namespace(model="SiT-XL/2", image_size=256, path_type="GVP")
    trained = {"model": {name: x + 1 for name, x in averaged.items()}, "ema": averaged, "opt": {}, "args": args}
    torch.save(trained, tmp_path / "dit.pt")
    options = [f"--weights={tmp_path / 'dit.pt'}", "--heads=2", f"--out={tmp_path / 'run'}"]
    assert run("convert", "--from=dit", *options) == 0
    said = capsys.readouterr().out
    assert "the tensors of 'ema' in the checkpoint were read, and not of 'model'" in said and "'module.'" in said
    assert "the checkpoint was trained with model=SiT-XL/2 path_type=GVP" in said  # and not as --from says
    wanted = {name: x.astype(np.float16) if half else x for name, x in weights.items()}
    assert_same(read_tensors(tmp_path / "dit.pt"), wanted)


class Other:
    """A class that no checkpoint may bring."""


def test_a_checkpoint_with_other_classes_is_refused(weights, tmp_path):
    torch = pytest.importorskip("torch", reason="needs sora_jax[text]")
    torch.save({"ema": {name: torch.tensor(x) for name, x in weights.items()}, "args": Other()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="it holds more than tensors, or is damaged"):
        read_tensors(tmp_path / "x.pt")


# ------------------------------------------------------------------------------------------- folders of diffusers


def write_layout(folder, name, layout):
    """A folder of diffusers with its weights in these files; returns the weights."""
    golden = Golden(name)
    weights = dit_weights(golden) if name == "dit_diffusers" else golden.weights
    write_folder(folder, golden, dits.CLASSES[0] if name == "dit_diffusers" else "AutoencoderKL", weights)
    (folder / f"{WEIGHTS}.safetensors").unlink()
    if layout.endswith(".json"):
        variant = layout.removeprefix(f"{WEIGHTS}.safetensors.index").removesuffix(".json")
        files = [f"{WEIGHTS}{variant}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        index = {tensor: files[i % 2] for i, tensor in enumerate(weights)}
        for file in files:
            write_tensors(folder / file, {tensor: weights[tensor] for tensor in weights if index[tensor] == file})
        (folder / layout).write_text(json.dumps({"weight_map": index}))
    else:
        write_tensors(folder / layout, weights)
    return weights


LAYOUTS = [
    f"{WEIGHTS}.{ending}" for ending in ("safetensors.index.json", "fp16.safetensors", "safetensors.index.fp16.json")
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, kind", [("kl4", "diffusers-vae"), ("dit_diffusers", "diffusers-dit")])
def test_parts_and_variants_of_a_folder_are_taken_and_told(tmp_path, name, kind, layout):
    wanted, notes = write_layout(tmp_path, name, layout), []
    assert_same(read_tensors(tmp_path, notes), wanted)
    read = read_vae if kind == "diffusers-vae" else dits.read_diffusers
    told = []
    read(tmp_path, told)
    assert told == notes == ([f"{layout!r} was read, of the variant 'fp16'"] if "fp16" in layout else [])


def test_the_whole_precision_is_preferred_to_variants(tmp_path):
    for number, variant in enumerate((".ema", ".fp16", "")):
        file = tmp_path / f"{WEIGHTS}{variant}.safetensors"
        write_tensors(file, {"x": np.full(1, number, np.float32)})
        assert read_tensors(tmp_path)["x"] == number


# ------------------------------------------------------------------------------------------------- broken values

FORMATS = {  # --from: golden, a tensor
    "dit": ("dit_official", "blocks.1.mlp.fc1.weight"),
    "sit": ("dit_official", "final_layer.linear.bias"),
    "diffusers-dit": ("dit_diffusers", "transformer_blocks.0.attn1.to_q.weight"),
    "diffusers-vae": ("kl4", "decoder.conv_in.bias"),
}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_value_that_is_not_finite_is_refused_by_the_name_of_its_tensor(tmp_path, capsys, kind, value):
    name, tensor = FORMATS[kind]
    golden = Golden(name)
    weights = golden.weights if name == "kl4" else dit_weights(golden)
    broken = weights[tensor].copy()
    broken.flat[1] = value
    path = tmp_path / "weights"
    if kind in ("dit", "sit"):
        path = write_official(tmp_path / "weights.safetensors", golden, **{tensor: broken})
    else:
        path.mkdir()
        write_folder(path, golden, "AutoencoderKL" if name == "kl4" else dits.CLASSES[0], weights | {tensor: broken})
    assert run("convert", f"--from={kind}", f"--weights={path}", f"--out={tmp_path / 'run'}") == 2
    said = capsys.readouterr().err
    assert f"its tensors must be finite, and there is a NaN or infinity in {tensor}\n" in said
    assert not (tmp_path / "run").exists()


def test_many_broken_tensors_are_counted(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {f"t{i}": np.full(1, np.nan, np.float32) for i in range(5)})
    with pytest.raises(UserError, match="infinity in t0 .the first of 5 arrays.$"):
        read_tensors(tmp_path / "x.safetensors")
