"""The white-box denoiser: packed equals one by one, nothing leaks, its block is CRATE's, and all meshes agree.

All parameters are random, so no gate is closed; float32.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.config import from_dict, to_dict
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.errors import UserError
from sora_jax.models import crate, denoiser
from sora_jax.models.crate import SIZES, CrateConfig
from sora_jax.models.crate_blocks import block, block_specs
from sora_jax.models.denoiser import denoise, denoiser_specs, encode_condition, forward_flops, has_trunk
from sora_jax.models.text import TextConfig
from sora_jax.nn.pack import Pack, per_slot
from sora_jax.nn.params import abstract, count, init, shardings
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, denoiser_loss
from sora_jax.train.state import MODEL
from sora_jax.train.step import gradients

TEXT = TextConfig(vocabulary=16, width=16, depth=1, head_width=8)
CONFIG = CrateConfig(depth=2, width=24, heads=2, latent_channels=2, text=TEXT, classes=3, remat="none", dtype="float32")
RUN = DenoiserRun(model=CONFIG, packing=PackingConfig(), diffusion=DiffusionConfig(caption_dropout=0.5))


@pytest.fixture(scope="module")
def params(randomised):
    """Random parameters, the modulation small: a large one multiplies the rounding errors of noise levels."""
    values = randomised(denoiser_specs(CONFIG), scale=0.2)
    return values | {"modulation": jax.tree.map(lambda x: 0.1 * x, values["modulation"])}


def times_of(pack):
    """Some noise level in (0, 1) for each row: a function of the clip alone."""
    return per_slot((pack.clip_ids_BS % 7 + 1) / 9, pack.row_slots_BR)


@functools.cache
def evaluator(run: DenoiserRun):
    """Compiled (params, pack) -> output for the pack's own tokens, loss of step 3 and its gradient."""

    def evaluate(params, pack):
        output_BLP = denoise(params, run.model, pack, pack.tokens_BLP, times_of(pack))
        gradient, total, _, _ = gradients(functools.partial(denoiser_loss, run), {MODEL: params}, (), pack, 3, 0)
        return output_BLP, total[MODEL], gradient[MODEL]

    return jax.jit(evaluate)


def outputs(output_BLP, pack: Pack) -> dict[int, np.ndarray]:
    """The output of each clip, in the order of its tokens."""
    found = {}
    for b, slot in zip(*np.nonzero(pack.clip_ids_BS), strict=True):
        places = np.flatnonzero(pack.segments_BL[b] == slot + 1)
        found[int(pack.clip_ids_BS[b, slot])] = np.asarray(output_BLP)[b, places[np.argsort(pack.index_BL[b][places])]]
    return found


def test_one_line_selects_the_network(clips, packed):
    """At the start the output is exactly 0, and files tell the network by its name."""
    pack = packed([clips[:3], clips[3:]])
    start = jax.jit(
        lambda key: denoise(init(denoiser_specs(CONFIG), key), CONFIG, pack, pack.tokens_BLP, times_of(pack))
    )
    found = np.asarray(start(jax.random.key(0)))
    assert found.shape == pack.tokens_BLP.shape and not found.any()
    assert from_dict(DenoiserRun, to_dict(RUN)).model == CONFIG and to_dict(RUN)["model"]["name"] == "crate"
    assert not has_trunk(CONFIG)  # its blocks do not add to tokens, so no step can be skipped


def test_packed_equals_one_by_one(params, clips, packed, alone):
    """Outputs, loss and the gradient of every parameter: two packs with padding against clips without any."""
    clips = [dataclasses.replace(clip, label=i % 3) for i, clip in enumerate(clips)]
    together = packed([clips[:3], clips[3:]])
    output, loss, gradient = evaluator(RUN)(params, together)
    singles = [evaluator(RUN)(params, alone(clip)) for clip in clips]
    found = outputs(output, together)
    for clip, single in zip(clips, singles, strict=True):
        assert np.abs(single[0]).max() > 0.1
        assert_near(found[clip.clip_id], single[0][0])
    assert_near(loss, sum(single[1] for single in singles))
    total = jax.tree.map(lambda *parts: sum(parts), *(single[2] for single in singles))
    assert all(np.abs(leaf).max() > 1e-5 for leaf in jax.tree.leaves(total))
    assert_near(gradient, total, share=1e-3)


def test_other_clips_have_exactly_no_gradient(params, clips, packed):
    """Tokens, coordinates and noise levels: those of clip 2 alone reach the outputs of clip 2."""
    pack = packed([clips[:3], clips[3:]])
    mine_BL = np.zeros(pack.segments_BL.shape, bool)
    mine_BL[0] = pack.segments_BL[0] == 2

    @jax.jit
    @jax.grad
    def slope(inputs, params):
        x_BLP, coords_BL3, times_BR = inputs
        output = denoise(params, CONFIG, pack.replace(coords_BL3=coords_BL3), x_BLP, times_BR)
        return jnp.where(mine_BL[..., None], jnp.sin(output), 0).sum()

    x, coords, times = map(np.asarray, slope((pack.tokens_BLP, pack.coords_BL3, times_of(pack)), params))
    for gradient, own in ((x, mine_BL), (coords, mine_BL), (times, np.arange(8).reshape(2, 4) == 1)):
        gradient = gradient.reshape(*own.shape, -1)
        assert not gradient[~own].any()
        assert gradient[own].any(-1).all()


def test_what_is_asked_changes_what_is_predicted(params, clips, packed):
    """Class, caption, noise level and positions each move the output."""
    pack = packed([clips[:3], clips[3:]])
    run = jax.jit(lambda pack, times: denoise(params, CONFIG, pack, pack.tokens_BLP, times))
    plain = run(pack, times_of(pack))
    for other, times in (
        (pack.replace(labels_BS=pack.labels_BS + 1), times_of(pack)),
        (pack.replace(text_BM=np.where(pack.text_BM > 0, 15 - pack.text_BM, 0)), times_of(pack)),
        (pack.replace(coords_BL3=2 * pack.coords_BL3), times_of(pack)),
        (pack, 0.5 * times_of(pack)),
    ):
        assert np.abs(run(other, times) - plain)[pack.segments_BL > 0].max() > 1e-3


def test_without_modulation_and_captions_the_blocks_are_those_of_the_paper(params, clips, packed):
    """What the modulation starts with, zero, leaves a plain stack of `crate_blocks.block`."""
    pack = packed([clips[:3], clips[3:]])
    config = dataclasses.replace(CONFIG, text=None)
    own = {name: params["blocks"][name] for name in block_specs(24, 2)}
    params = params | {"blocks": own, "modulation": jax.tree.map(jnp.zeros_like, params["modulation"])}
    x_BLD, context = crate.enter(params, config, pack, pack.tokens_BLP, times_of(pack), None)
    for layer in range(config.depth):
        p = jax.tree.map(lambda x, layer=layer: x[layer], own)
        wanted = block(p, x_BLD, context.where)
        x_BLD = crate.block(p, config, x_BLD, context)
        assert_near(x_BLD, wanted)
        assert (np.asarray(x_BLD) >= 0).all() and (np.asarray(x_BLD) == 0).mean() > 0.1


def test_recomputed_blocks_have_the_same_gradient(params, clips, packed):
    pack = packed([clips[:3], clips[3:]])
    run = dataclasses.replace(RUN, model=dataclasses.replace(CONFIG, remat="full", unroll=2))
    assert_near(evaluator(run)(params, pack), evaluator(RUN)(params, pack))


def test_encoded_captions_may_be_given(params, clips, packed):
    pack = packed([clips[:3], clips[3:]])
    text = jax.jit(lambda p: encode_condition(p, CONFIG, pack))(params)
    assert text.keys_values[0].shape == (2, *pack.text_BM.shape, 2, 12)
    run = jax.jit(lambda p, text: denoise(p, CONFIG, pack, pack.tokens_BLP, times_of(pack), text))
    assert_near(run(params, text), evaluator(RUN)(params, pack)[0])


def test_variances_and_guides_have_their_places(randomised, clips, packed):
    config = dataclasses.replace(CONFIG, learned_variance=True, guides=True)
    pack = packed([clips[:3], clips[3:]], guides=True)
    params = randomised(denoiser_specs(config))
    run = jax.jit(lambda pack: denoise(params, config, pack, pack.tokens_BLP, times_of(pack)))
    plain = run(pack)
    assert plain.shape == (*pack.tokens_BLP.shape[:2], 2 * config.patch_values)
    kinds = np.array(pack.guides_BL)
    kinds[0, 0] = 1
    assert np.abs(run(pack.replace(guides_BL=kinds)) - plain)[0, 0].max() > 1e-3


MESHES = {
    "2x2x2": (MeshConfig(data=2, fsdp=2, tensor=2), "gather"),
    "2x2, sequence 2": (MeshConfig(data=2, fsdp=2, sequence=2), "all_to_all"),
}


@pytest.mark.parametrize("name", MESHES)
def test_meshes_agree_with_one_device(params, clips, packed, name):
    """Loss and gradient of eight packs."""
    settings, sequence = MESHES[name]
    rows = [clips[i % 3 : i % 4 + 1] or clips[:1] for i in range(8)]
    pack = packed(
        [[dataclasses.replace(c, clip_id=10 * i + c.clip_id % 97) for c in row] for i, row in enumerate(rows)]
    )
    batch = {name: values for name, values in vars(pack).items() if values is not None}
    wanted = evaluator(RUN)(params, pack)[1:]
    model = dataclasses.replace(CONFIG, sequence=sequence, attention="blockwise")
    loss = functools.partial(denoiser_loss, dataclasses.replace(RUN, model=model))
    mesh = make_mesh(settings)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(denoiser_specs(CONFIG), mesh))
        batch = Pack(**place_batch(batch, mesh))
        gradient, total, _, _ = jax.jit(lambda p, b: gradients(loss, {MODEL: p}, (), b, 3, 0))(placed, batch)
    assert_near((total[MODEL], gradient[MODEL]), wanted, share=1e-2)


def by_hand(tokens, words, rows, clips=1, D=128, P=8, E=64, depth=2):
    """Multiply-adds of clips: a block has 4 D^2 for a token (D is multiplied twice) and 2 T^2 D for its attention."""
    text = words * 12 * E * E + 2 * words**2 * E
    ends = tokens * (P * D + 2 * P * D) + rows * (256 * D + D * D + 7 * D * D) + clips * E * D
    block = tokens * 4 * D * D + 2 * tokens**2 * D
    cross = tokens * 2 * D * D + words * 2 * E * D + 2 * tokens * words * D
    return text + ends + depth * (block + cross)


def test_flops_by_hand_and_by_xla(clips, alone):
    """XLA also counts norms, softmax and activations, and spreading modulation rows."""
    text = TextConfig(vocabulary=16, width=64, depth=1, head_width=32)
    config = CrateConfig(
        depth=2, width=128, heads=2, latent_channels=2, text=text, remat="none", unroll=2, dtype="float32"
    )
    clip = dataclasses.replace(clips[0], values=np.zeros((4, 16, 16, 2), np.float32), text=np.arange(3, 13))
    pack = alone(clip)
    batch = {name: values for name, values in vars(pack).items() if values is not None}
    assert forward_flops(config, batch) == 2 * by_hand(256, 10, 1)
    run = jax.jit(lambda p, pack: denoise(p, config, pack, pack.tokens_BLP, np.full((1, 1), 0.5, np.float32)))
    counted = run.lower(abstract(denoiser_specs(config)), pack).compile().cost_analysis()["flops"]
    assert 1.0 < counted / forward_flops(config, batch) < 1.2


@pytest.mark.parametrize("size", SIZES)
def test_sizes_in_closed_form(size):
    """Blocks have 3 D^2 + 5 D numbers; the modulation, of 7 D^2, is there once."""
    depth, D, heads = SIZES[size]
    config = CrateConfig(depth=depth, width=D, heads=heads, patch=(1, 2, 2), latent_channels=4, text=None)
    P, ways = 16, (256 * D + D) + (D * D + D) + 7 * (D * D + D)
    ends = (P * D + D) + (D * 2 * P + 2 * P)
    assert count(denoiser_specs(config)) == depth * (3 * D * D + 5 * D) + ways + ends


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 5}, "model.width is 24; it must be an even multiple of model.heads = 5"),
        ({"heads": 6}, "model.width / model.heads is 4; with model.rotary it must be at least 6"),
        ({"ista_step": 0.0}, "model.ista_step is 0.0; it must be positive and finite"),
        ({"ista_threshold": -1.0}, "model.ista_threshold is -1.0; it must be 0 or more, and finite"),
        ({"ista_threshold": math.nan}, "model.ista_threshold is nan; it must be 0 or more, and finite"),
        ({"remat": "some"}, "model.remat is 'some'"),
    ],
)
def test_mistakes_are_one_sentence(change, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, **change)
    assert str(error.value).startswith(message)


def test_the_front_knows_it():
    assert denoiser.MODULES[CrateConfig] is crate
