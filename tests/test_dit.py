"""DiT as a configuration: the paper's counts, its four ways of conditioning, its initial values, its positions."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.config import load
from sora_jax.kinds import run_config
from sora_jax.models.conditioning import MODULATED
from sora_jax.models.denoiser import forward_flops
from sora_jax.models.transformer import TransformerConfig, denoise, denoiser_specs
from sora_jax.nn.pack import Pack, drop_captions, per_slot
from sora_jax.nn.params import count, init, shardings
from sora_jax.nn.positions import sincos_table
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch

CONFIGS = Path(__file__).parents[1] / "configs"
TABLE = {  # 2212.09748, table 4: Gflops (multiply-adds) and exact parameters, the class table and variance included
    "S/8": (0.36, 33_142_016),
    "S/4": (1.41, 32_920_448),
    "S/2": (6.06, 32_865_056),
    "B/8": (1.42, 130_869_248),
    "B/4": (5.56, 130_426_496),
    "B/2": (23.01, 130_315_808),
    "L/8": (5.01, 458_578_432),
    "L/4": (19.70, 457_988_224),
    "L/2": (80.71, 457_840_672),
    "XL/8": (7.39, 675_664_640),
    "XL/4": (29.05, 675_000_704),
    "XL/2": (118.64, 674_834_720),
    "XL/2,512": (524.6, 674_834_720),
}
ABLATION = {  # table 4, last rows: Gflops and millions of parameters of XL/2
    "in_context": (119.37, 449),
    "cross_attention": (137.62, 598),
    "adaln": (118.56, 600),
    "adaln_zero": (118.64, 675),
}
SMALL = TransformerConfig(
    depth=2, width=24, heads=2, latent_channels=2, text=None, classes=5, rotary=False, qk_norm=False,
    sincos_positions=True, sincos_axes="xy", learned_variance=True, step_times=True, joint_qkv_init=True,
    remat="none", dtype="float32",
)  # fmt: skip


def read(variant: str):
    return run_config(load(f"{CONFIGS / 'dit.py'}:{variant}"))


def one_image(run) -> dict:
    """The batch of one picture that fills a pack, as the counts need it."""
    side = int(run.packing.length**0.5)
    return {"grids_BS3": np.array([[[1, side, side]]]), "row_slots_BR": np.zeros((1, 1), int)}


@pytest.mark.parametrize("variant", TABLE)
def test_parameters_and_multiply_adds_are_those_of_the_paper(variant):
    run, (gflops, params) = read(variant), TABLE[variant]
    assert count(denoiser_specs(run.model)) == params
    assert forward_flops(run.model, one_image(run)) / 2e9 == pytest.approx(gflops, abs=0.03 if gflops < 200 else 0.2)


@pytest.mark.parametrize("conditioning", ABLATION)
def test_the_ablation_of_conditioning_is_that_of_the_paper(conditioning):
    run, (gflops, millions) = read(f"XL/2,{conditioning}"), ABLATION[conditioning]
    assert round(count(denoiser_specs(run.model)) / 1e6) == millions
    assert forward_flops(run.model, one_image(run)) / 2e9 == pytest.approx(gflops, abs=0.03)


@pytest.fixture(scope="module")
def labelled(clips):
    return [dataclasses.replace(clip, label=number) for number, clip in enumerate(clips)]


def times_of(pack):
    return per_slot((pack.clip_ids_BS % 7 + 1) / 10, pack.row_slots_BR).astype(jnp.float32)


def of_clip(output_BLP, pack, clip_id):
    """The outputs of a clip, in the order of its tokens."""
    (row,), (slot,) = np.nonzero(pack.clip_ids_BS == clip_id)
    return np.asarray(output_BLP[row, np.flatnonzero(pack.segments_BL[row] == slot + 1)])


@pytest.mark.parametrize("conditioning", MODULATED)
@pytest.mark.parametrize("rows_per_clip", [1, 2])
def test_packed_equals_one_by_one_and_the_class_and_time_are_read(
    conditioning, rows_per_clip, labelled, packed, alone, randomised
):
    config = dataclasses.replace(SMALL, conditioning=conditioning)
    params = randomised(denoiser_specs(config))
    run = jax.jit(lambda pack, t: denoise(params, config, pack, pack.tokens_BLP, t))
    pack = packed([labelled[:3], labelled[3:]], rows_per_clip=rows_per_clip)
    together = run(pack, times_of(pack))
    assert together.shape[-1] == 2 * SMALL.patch_values
    for clip in labelled[:2]:
        single = alone(clip, rows_per_clip=rows_per_clip)
        expected = np.asarray(run(single, times_of(single))[0])
        np.testing.assert_allclose(of_clip(together, pack, clip.clip_id), expected, atol=2e-5 * np.abs(expected).max())
    relabelled = pack.replace(labels_BS=np.where(pack.clip_ids_BS == labelled[0].clip_id, 5, pack.labels_BS))
    later = np.where(pack.row_slots_BR == 0, 0.9, times_of(pack)).astype(np.float32)
    for changed in (run(relabelled, times_of(pack)), run(pack, later)):
        assert np.abs(of_clip(changed - together, pack, labelled[0].clip_id)).max() > 1e-2
        np.testing.assert_array_equal(
            of_clip(changed, pack, labelled[1].clip_id), of_clip(together, pack, labelled[1].clip_id)
        )


@pytest.mark.parametrize("conditioning", MODULATED)
def test_every_way_of_conditioning_runs_on_a_mesh(conditioning, labelled, packed, randomised):
    config = dataclasses.replace(SMALL, conditioning=conditioning)
    params, pack = randomised(denoiser_specs(config)), packed([labelled[:2], labelled[2:]] * 2)

    def loss(params, pack):
        return jnp.square(denoise(params, config, pack, pack.tokens_BLP, times_of(pack))).sum()

    expected = jax.jit(jax.value_and_grad(loss))(params, pack)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(denoiser_specs(config), mesh))
        arrays = {name: values for name, values in vars(pack).items() if values is not None}
        found = jax.jit(jax.value_and_grad(loss))(placed, Pack(**place_batch(arrays, mesh)))
    for one, other in zip(jax.tree.leaves(jax.device_get(found)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=5e-5 * max(np.abs(other).max(), 1e-2))


def test_a_dropped_class_is_the_row_of_none(labelled, packed, randomised):
    params = randomised(denoiser_specs(SMALL))
    run = jax.jit(lambda params, pack: denoise(params, SMALL, pack, pack.tokens_BLP, times_of(pack)))
    pack = packed([labelled])
    dropped = drop_captions(pack, pack.clip_ids_BS == labelled[1].clip_id)
    table = params["classes"]
    as_class_1 = run(params | {"classes": table.at[1].set(table[5])}, pack)
    np.testing.assert_allclose(run(params, dropped), as_class_1, atol=1e-5)
    unlabelled = packed([[dataclasses.replace(clip, label=-1) for clip in labelled]])
    everything = drop_captions(pack, np.ones_like(pack.clip_ids_BS, bool))
    np.testing.assert_array_equal(run(params, unlabelled), run(params, everything))


@pytest.mark.parametrize("conditioning", MODULATED)
def test_at_initialisation_the_output_is_zero_and_with_gates_each_block_is_the_identity(conditioning, labelled, packed):
    config = dataclasses.replace(SMALL, conditioning=conditioning)
    params, pack = init(denoiser_specs(config), jax.random.key(0)), packed([labelled])
    run = jax.jit(lambda params: denoise(params, config, pack, pack.tokens_BLP, times_of(pack)))
    assert not np.asarray(run(params)).any()
    opened = params | {"head": {"weight": jnp.ones_like(params["head"]["weight"]), "bias": params["head"]["bias"]}}
    other_blocks = jax.tree.map(jnp.zeros_like, opened["blocks"])
    passes = np.allclose(run(opened), run(opened | {"blocks": other_blocks}), atol=1e-6)
    assert passes == (conditioning == "adaln_zero")


def test_initial_values_are_those_of_the_paper():
    """Xavier uniform has the variance 2 / (fan in + fan out); q, k and v are one matrix to it."""
    model = dataclasses.replace(read("S/2").model, depth=2)
    params, D = init(denoiser_specs(model), jax.random.key(1)), 384
    blocks = params["blocks"]
    uniform = {
        (D, 3 * D): blocks["qkv"]["weight"],
        (D, D): blocks["merge"]["weight"],
        (D, 4 * D): blocks["mlp"]["up"]["weight"],
        (4 * D, D): blocks["mlp"]["down"]["weight"],
        (16, D): params["patch"]["weight"],
    }
    for (fan_in, fan_out), weight in uniform.items():
        assert weight.std() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.02)
        assert np.abs(weight).max() == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.01)
    for table in (params["classes"], params["time_in"]["weight"], params["time_out"]["weight"]):
        assert table.std() == pytest.approx(0.02, rel=0.02) and np.abs(table).max() > 0.06
    for zero in (params["head"], params["modulation"], blocks["modulation"]):
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(zero))
    biases = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "bias"]
    assert len(biases) == 4 + 1 + 1 + 4 and not any(np.asarray(bias).any() for bias in biases)


def test_positions_are_the_published_table():
    """Row (y = 0, x = 1) of the table of width 8: the first half is that of x, each half sines, then cosines."""
    coords = jnp.array([[[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]])
    x_then_y = [0.8415, 0.01, 0.5403, 1.0, 0, 0, 1, 1]
    np.testing.assert_allclose(sincos_table(coords, 8, axes="xy")[0, 0], x_then_y, atol=1e-4)
    np.testing.assert_allclose(sincos_table(coords, 8, axes="xy")[0, 1], [*x_then_y[4:], *x_then_y[:4]], atol=1e-4)


def test_the_network_sees_the_number_of_a_step():
    """Time (i + 1) / 1000 in float32 gives the sinusoids of i exactly; between steps it goes on smoothly."""
    from sora_jax.models.conditioning import step_number
    from sora_jax.nn.layers import time_features

    steps = np.arange(1000)
    seen = np.asarray(time_features(step_number(jnp.asarray((steps + 1) / 1000, jnp.float32)), 256))
    frequencies = np.exp(-np.log(10_000) * np.arange(128) / 128)
    angles = steps[:, None] * frequencies
    np.testing.assert_allclose(seen, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-6)
    np.testing.assert_allclose(
        seen[1, [0, 1, 2, 128, 129, 130]], [0.540302, 0.597375, 0.647906, 0.841471, 0.801962, 0.76172], atol=2e-6
    )
    assert step_number(jnp.float32(0.5004)) == pytest.approx(499.4, abs=1e-3)


def test_the_recipe_is_that_of_the_paper():
    run = read("XL/2")
    assert (run.batch, run.packing.length, run.packing.slots) == (256, 256, 1)
    assert read("XL/2,512").packing.length == 1024
    optim = run.optim
    assert (optim.learning_rate, optim.b1, optim.b2, optim.weight_decay) == (1e-4, 0.9, 0.999, 0)
    assert (optim.schedule, optim.warmup_steps, optim.clip_norm, optim.ema, optim.ema_warmup) == (
        "constant", 0, 0, (0.9999,), False,
    )  # fmt: skip
    assert (run.diffusion.process, run.diffusion.prediction, run.diffusion.caption_dropout) == ("vp_linear", "eps", 0.1)
    assert run.diffusion.times.distribution == "steps" and run.model.learned_variance
