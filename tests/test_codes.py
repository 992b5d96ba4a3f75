"""Discrete codes: rounding, indices, straight-through gradients, entropy, use of a codebook."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.errors import UserError
from sora_jax.models.codes import CodesConfig, Usage, channels, code_losses, codebook_size, codes_of, indices, quantize
from sora_jax.nn.past import spread
from sora_jax.parallel.mesh import MeshConfig, make_mesh, place_batch
from sora_jax.parallel.rules import partition

FSQ, LFQ, BSQ = (CodesConfig(name) for name in ("fsq", "lfq", "bsq"))
CODES = {"fsq": (FSQ, 5), "lfq": (LFQ, 10), "bsq": (BSQ, 10)}
Z = (-9, -2, -1, -0.5, -0.1, 0, 0.1, 0.5, 1, 2, 9)
LN2 = math.log(2.0)
coded = jax.jit(quantize, static_argnums=0)
index = jax.jit(indices, static_argnums=0)
decoded = jax.jit(codes_of, static_argnums=(0, 2))
each_kind = pytest.mark.parametrize("config, count", CODES.values(), ids=CODES)


def latents(count, seed=0, shape=(2, 2, 4, 3), scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (*shape, count))


@functools.partial(jax.jit, static_argnums=0)
def losses(config, z, weight=None):
    """The losses of latents and their codes."""
    return code_losses(config, z, quantize(config, z), weight)


@functools.partial(jax.jit, static_argnums=0)
def loss_gradient(config, z, weight=None):
    return jax.grad(lambda z: losses(config, z, weight)[0])(z)


def bounded(z, levels):
    """FSQ's bounded latent in code values, in float64 with NumPy."""
    z, levels = np.asarray(z, np.float64), np.array(levels)
    half, offset = (levels - 1) * 1.001 / 2, np.where(levels % 2, 0, 0.5)
    return (np.tanh(z + np.arctanh(offset / half)) * half - offset) / (levels // 2)


@pytest.mark.parametrize(
    "level, wanted", [(5, (0, 0, 0, 1, 2, 2, 2, 3, 4, 4, 4)), (8, (0, 0, 1, 2, 4, 4, 4, 5, 6, 7, 7))]
)
def test_fsq_rounds_to_its_levels(level, wanted):
    config = CodesConfig("fsq", levels=(level,))
    codes = coded(config, jnp.array(Z, jnp.float32).reshape(1, 1, 1, -1, 1))
    np.testing.assert_array_equal(codes.ravel() * (level // 2) + level // 2, wanted)
    np.testing.assert_array_equal(index(config, codes).ravel(), wanted)  # of one channel the level itself


@each_kind
def test_codes_are_0_in_the_middle_and_reach_the_ends(config, count):
    """Zero is a code of FSQ; of bits, 0 is counted as +1."""
    values = [np.unique(coded(config, jnp.full((1, 1, 1, 1, count), z))) for z in (-100.0, 0.0, 100.0)]
    size = 1 / math.sqrt(count) if config is BSQ else 1.0
    middle = 0.0 if config is FSQ else size
    np.testing.assert_allclose(np.ravel(values), [-size, middle, size], rtol=1e-6)


@each_kind
def test_every_index_has_a_code_of_its_own(config, count):
    size = codebook_size(config, count)
    assert size == {"fsq": 7 * 5**4, "lfq": 2**10, "bsq": 2**10}[config.name]
    numbers = np.arange(size, dtype=np.int32).reshape(1, 1, 1, -1)
    codes = decoded(config, numbers, count)
    assert codes.shape == (1, 1, 1, size, count) and len(np.unique(codes.reshape(size, count), axis=0)) == size
    np.testing.assert_array_equal(index(config, codes), numbers, strict=True)  # int32, too


@each_kind
def test_codes_survive_indices_to_the_last_bit(config, count):
    @jax.jit
    def run(z):
        codes = quantize(config, z)
        return codes, codes_of(config, indices(config, codes), count)

    codes, again = run(latents(count))
    np.testing.assert_array_equal(codes, again)
    assert len(np.unique(codes.reshape(-1, count), axis=0)) > 24  # of 48 tokens


def test_the_first_channel_is_the_least_significant_digit():
    codes = decoded(FSQ, np.array([[[[0, 1, 7, 7 * 5]]]]), 5)[0, 0, 0]
    np.testing.assert_allclose(codes[0], -1)
    moved = np.argwhere(np.asarray(codes[1:]) > np.asarray(codes[0]))
    np.testing.assert_array_equal(moved, [[0, 0], [1, 1], [2, 2]])


@pytest.mark.parametrize("config", [LFQ, BSQ], ids=["lfq", "bsq"])
def test_31_bits_have_an_index_and_more_are_refused(config):
    numbers = jnp.array([[[[0, 1, 2**30, 2**31 - 1]]]], jnp.int32)
    np.testing.assert_array_equal(index(config, decoded(config, numbers, 31)), numbers)
    wide = coded(config, latents(36))
    assert wide.shape[-1] == 36 and codebook_size(config, 36) == 2**36
    with pytest.raises(UserError, match=r"latent_channels is 36, which makes 68719476736 codes; .* at most 31 bits"):
        indices(config, wide)
    with pytest.raises(UserError, match="latent_channels is 32"):
        codes_of(config, numbers, 32)


def test_bsq_codes_have_unit_length_whatever_the_scale():
    z = latents(7)
    codes = coded(BSQ, z)
    np.testing.assert_allclose(np.linalg.norm(codes, axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(codes, coded(BSQ, 50 * z))
    np.testing.assert_allclose(losses(BSQ, z)[0], losses(BSQ, 50 * z)[0], rtol=1e-4)


def weighted_sum(z, config, **options):
    return (quantize(config, z, **options) * latents(z.shape[-1], seed=9)).sum()


def test_fsq_gradient_is_that_of_the_bounded_latent():
    """Against central differences of the bounded latent in float64."""
    z, step = np.asarray(latents(5), np.float64), 1e-5
    slope = (bounded(z + step, FSQ.levels) - bounded(z - step, FSQ.levels)) / (2 * step)
    found = jax.jit(jax.grad(functools.partial(weighted_sum, config=FSQ)))(latents(5))
    np.testing.assert_allclose(found, slope * latents(5, seed=9), rtol=1e-4, atol=1e-5)


def test_gradients_of_signs_are_those_of_the_latent_and_of_the_normalised_latent():
    """LFQ's is the identity; that of z / |z| is the part of the cotangent across z, over |z|."""
    found = jax.grad(functools.partial(weighted_sum, config=LFQ))(latents(6))
    np.testing.assert_allclose(found, latents(6, seed=9), rtol=1e-6)
    z, weight = (np.asarray(latents(6, seed=seed), np.float64) for seed in (0, 9))
    length = np.linalg.norm(z, axis=-1, keepdims=True)
    across = weight - z * (z * weight).sum(-1, keepdims=True) / length**2
    found = jax.grad(functools.partial(weighted_sum, config=BSQ))(latents(6))
    np.testing.assert_allclose(found, across / length, rtol=1e-4, atol=1e-5)


@each_kind
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_gradients_are_finite_at_zero_and_far_away(config, count, value):
    def loss(z):
        codes = quantize(config, z)
        return codes.sum() + code_losses(config, z, codes)[0]

    assert np.isfinite(jax.grad(loss)(jnp.full((1, 1, 2, 2, count), value))).all()


@each_kind
def test_softened_codes_lie_within_half_a_step_of_the_bounded_latent(config, count):
    z = np.asarray(latents(count, shape=(4, 4, 8, 8)))
    if config is FSQ:
        limit, size = bounded(z, FSQ.levels), 1 / (np.array(FSQ.levels) // 2)
    elif config is LFQ:
        limit, size = np.clip(z, -1, 1), 2.0
    else:
        limit, size = z / np.linalg.norm(z, axis=-1, keepdims=True), 2 / math.sqrt(count)
    run = functools.partial(coded, config)
    noise, other = ((np.asarray(run(z, jax.random.key(seed), True)) - limit) / size for seed in range(2))
    assert np.abs(noise).max() < 0.5 + 1e-5
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1 / math.sqrt(12)) < 0.01  # uniform
    assert abs(np.corrcoef(noise[..., 0].ravel(), noise[..., 1].ravel())[0, 1]) < 0.15  # a draw for each channel
    assert np.abs(noise - other).max() > 0.5  # of the key


@each_kind
def test_soften_of_zero_rounds_and_half_is_between(config, count):
    z, key = latents(count), jax.random.key(0)
    run = functools.partial(coded, config)
    hard, soft = run(z), run(z, key, jnp.float32(1.0))
    np.testing.assert_array_equal(run(z, key, False), hard)
    np.testing.assert_array_equal(run(z, key, jnp.float32(0.0)), hard)
    np.testing.assert_allclose(run(z, key, jnp.float32(0.5)), (hard + soft) / 2, atol=1e-6)
    assert np.abs(soft - hard).max() > 0.1


def test_softened_gradients():
    """FSQ's and BSQ's are those of rounding; LFQ's is zero where the latent is clipped."""
    z, noise = latents(5, scale=2.0), dict(key=jax.random.key(0), soften=True)
    for config in (FSQ, BSQ):
        plain, soft = (jax.grad(functools.partial(weighted_sum, config=config, **o))(z) for o in ({}, noise))
        np.testing.assert_allclose(soft, plain, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(functools.partial(weighted_sum, config=LFQ, **noise))(z)
    np.testing.assert_allclose(gradient, np.where(np.abs(z) < 1, latents(5, seed=9), 0), atol=1e-6)


def test_softened_codes_have_the_index_of_the_nearest_code():
    """Also where noise goes beyond the outermost value."""
    for level in (5, 8):
        config = CodesConfig("fsq", levels=(level,))
        low, high = -(level // 2), (level - 1) // 2
        codes = jnp.array([low - 0.5, low + 0.4, 0.3, high - 0.6, high + 0.7]) / (level // 2)
        found = index(config, codes.reshape(1, 1, 1, -1, 1)).ravel()
        np.testing.assert_array_equal(found, [0, 0, level // 2, level - 2, level - 1])
    with pytest.raises(ValueError, match="key"):
        quantize(FSQ, latents(5), soften=True)


def entropy(p, axis=-1):
    return -(p * np.log(np.maximum(p, 1e-300))).sum(axis)


def entropies_by_table(config, z, weight=None):
    """Token and batch entropy from the probability of every code by its distance to z, in float64."""
    count = z.shape[-1]
    z = np.asarray(z, np.float64).reshape(-1, count)
    size = 1.0
    if config.name == "bsq":
        z, size = z / np.linalg.norm(z, axis=-1, keepdims=True), 1 / math.sqrt(count)
    book = size * np.array(list(itertools.product((-1, 1), repeat=count)))
    score = np.exp(-np.square(z[:, None] - book).sum(-1) / config.tau)
    p = score / score.sum(-1, keepdims=True)
    weight = np.ones(len(z)) if weight is None else np.asarray(weight).ravel()
    return np.average(entropy(p), weights=weight), entropy(np.average(p, axis=0, weights=weight))


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("config", [LFQ, BSQ, CodesConfig("bsq", tau=0.1)], ids=["lfq", "bsq", "bsq, cold"])
def test_entropies_are_those_of_a_table_of_all_codes(config, count):
    z = latents(count, scale=0.5) + 0.2
    weight = np.random.default_rng(0).uniform(0, 1, z.shape[:-1]).astype(np.float32)
    for given in (None, weight):
        _, found = losses(config, z, given)
        wanted = entropies_by_table(config, z, given)  # whose sphere has no eps: of one channel, 7e-5 apart
        np.testing.assert_allclose([found["token_entropy"], found["batch_entropy"]], wanted, rtol=1e-4, atol=1e-4)


def test_groups_of_bits_add_up():
    """Eleven bits are nine and two; the entropies of two groups are added, a bound of the whole from above."""
    z = latents(11, shape=(1, 1, 4, 3))
    found = losses(LFQ, z)[1]["batch_entropy"]
    parts = [entropies_by_table(LFQ, part)[1] for part in (z[..., :9], z[..., 9:])]
    np.testing.assert_allclose(found, sum(parts), rtol=1e-4)
    assert found > entropies_by_table(LFQ, z)[1] + 0.01


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_uniform_bits_have_full_entropy_a_constant_code_none_and_undecided_bits_both(name):
    config = CodesConfig(name, tau=0.02, entropy_weight=1.0, entropy_gamma=0.7, commit_weight=0.0)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=10)), np.float32)
    z = jnp.asarray(signs).reshape(4, 4, 8, 8, 10)
    loss, found = losses(config, z)
    np.testing.assert_allclose(found["batch_entropy"], 10 * LN2, rtol=1e-5)
    np.testing.assert_allclose(loss, -0.7 * 10 * LN2, rtol=1e-5)
    constant = jnp.broadcast_to(z[1, 2, 3, 4], z.shape)
    loss, found = losses(config, constant)
    np.testing.assert_allclose([loss, found["token_entropy"], found["batch_entropy"]], 0, atol=1e-5)
    _, found = losses(config, 0 * z)
    np.testing.assert_allclose([found["token_entropy"], found["batch_entropy"]], 10 * LN2, rtol=1e-5)


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_a_change_of_sign_leaves_the_entropies(name):
    config, z = CodesConfig(name, tau=0.3), latents(11, scale=0.4) + 0.3
    (_, one), (_, other) = (losses(config, x) for x in (z, -z))
    for part in ("token_entropy", "batch_entropy"):
        np.testing.assert_allclose(one[part], other[part], rtol=1e-5)


def test_loss_is_the_weighted_sum_of_its_parts():
    config, z = CodesConfig("lfq", entropy_weight=0.3, entropy_gamma=2.0, commit_weight=0.6), latents(6)
    loss, found = losses(config, z)
    token, batch = entropies_by_table(config, z)
    commit = np.square(np.abs(z) - 1).mean()  # the code is the sign
    np.testing.assert_allclose(found["commit"], commit, rtol=1e-5)
    np.testing.assert_allclose(loss, 0.3 * (token - 2 * batch) + 0.6 * commit, rtol=1e-4)


def test_commitment_moves_latents_and_not_codes():
    config, z = CodesConfig("lfq", entropy_weight=0.0, commit_weight=1.0), latents(6)
    gradient = jax.grad(lambda z, codes: code_losses(config, z, codes)[0], argnums=(0, 1))
    moved, codes = gradient(z, quantize(config, z))
    np.testing.assert_allclose(moved, 2 * (z - np.sign(z)) / z.size, rtol=1e-4, atol=1e-8)
    assert not np.any(codes)
    np.testing.assert_allclose(loss_gradient(config, z), moved, rtol=1e-6)  # nothing comes through the codes


def test_entropy_loss_makes_a_token_surer_and_a_batch_more_even():
    alone = CodesConfig("lfq", entropy_weight=1.0, entropy_gamma=0.0, commit_weight=0.0)
    even = CodesConfig("lfq", entropy_weight=1.0, entropy_gamma=9.0, commit_weight=0.0)
    z = 0.1 + jnp.abs(latents(4, scale=0.3))  # all bits lean to 1
    assert (loss_gradient(alone, z) < 0).all() and (loss_gradient(even, z) > 0).all()


@pytest.mark.parametrize("name", ["lfq", "bsq"])
def test_tokens_outside_of_a_mask_have_no_influence(name):
    config, z = CodesConfig(name, tau=0.3), latents(10)
    mask = np.zeros((2, 1, 4, 3), bool)
    mask[0, :, :2], mask[1, :, :, :2] = True, True
    kept = np.broadcast_to(mask, z.shape[:-1])
    assert_near(losses(config, z, mask), losses(config, z[kept].reshape(1, 1, 1, -1, 10)), 1e-5)
    gradient = loss_gradient(config, z, mask)
    assert not np.any(gradient[~kept]) and np.abs(gradient[kept]).min() > 0
    nothing = np.zeros(z.shape[:-1], np.float32)
    assert losses(config, z, nothing)[0] == 0 and not np.any(loss_gradient(config, z, nothing))


def test_fsq_and_continuous_latents_have_no_loss():
    z = latents(5)
    for config in (FSQ, CodesConfig()):
        assert losses(config, z) == (0, {})
    np.testing.assert_array_equal(quantize(CodesConfig(), z, soften=True), z)


def everything(config, z, weight, key):
    """Gradient, codes, softened codes, loss with its parts, and indices."""
    z = spread(z)

    def loss(z):
        codes = quantize(config, z)
        value, parts = code_losses(config, z, codes, weight)
        return value + jnp.square(codes - 0.3).mean(), (codes, quantize(config, z, key, True), value, parts)

    gradient, aux = jax.grad(loss, has_aux=True)(z)
    return gradient, aux, indices(config, aux[0])


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_kind
def test_eight_devices_compute_what_one_does(config, count, masked):
    """Clips and rows are split; a mean within each device would give another batch entropy."""
    shift = np.linspace(-1, 1, 4).reshape(4, 1, 1, 1, 1)  # every device's own bits are less even than all
    z = np.asarray(latents(count, shape=(4, 2, 8, 3)) + shift, np.float32)
    weight = np.asarray(np.random.default_rng(0).random((4, 1, 8, 1)) < 0.7) if masked else None
    run, mesh = jax.jit(functools.partial(everything, config)), make_mesh(MeshConfig(data=2, sequence=4))
    wanted = run(z, weight, jax.random.key(5))
    with jax.set_mesh(mesh):
        found = run(*place_batch((z, weight), mesh), jax.random.key(5))
    assert found[0].sharding.spec == partition("batch", "time", "height", "breadth", "channels")
    assert_near(found, wanted, 1e-5)


def test_use_and_perplexity_are_of_all_tokens_added():
    usage = Usage(8)
    assert usage.use == 0 and math.isnan(usage.perplexity)
    usage.add(np.array([[5, 5], [0, 5]], np.int32))
    assert (usage.tokens, usage.use) == (4, 2 / 8)
    usage.add(jnp.array([0, 0, 7, 7, 7, 5]))
    usage.add(np.zeros(0, np.int32))
    share = np.array([3, 4, 3]) / 10
    assert (usage.tokens, usage.use) == (10, 3 / 8)
    np.testing.assert_allclose(usage.perplexity, np.prod(share**-share), rtol=1e-12)
    usage = Usage(codebook_size(FSQ, 5))  # all equally often
    for part in np.array_split(np.tile(np.arange(4375), 2), 7):
        usage.add(part)
    assert usage.use == 1
    np.testing.assert_allclose(usage.perplexity, 4375, rtol=1e-9)


def test_one_batch_says_nothing_of_use():
    """Compare with the share 1 - (1 - 1/size)^n of equally likely codes that n tokens use."""
    usage, rng = Usage(2**12), np.random.default_rng(0)
    for total in (2**10, 2**15):
        usage.add(rng.integers(2**12, size=total - usage.tokens))
        assert abs(usage.use - (1 - (1 - 2.0**-12) ** total)) < 0.02
    assert usage.use > 0.99


def test_bits_per_pixel_and_indices_that_are_no_codes():
    assert Usage(2**18).bits_per_pixel((4, 8, 8)) == 18 / 256
    usage = Usage(2**31)  # no table of all codes
    usage.add(np.array([0, 2**31 - 1]))
    assert usage.bits_per_pixel((1, 1, 1)) == 31 and usage.use == 2 / 2**31
    with pytest.raises(ValueError, match="from -1 to 8; there are 8 codes"):
        Usage(8).add(np.array([8, -1]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="vq"), "name is 'vq'; allowed: 'none', 'fsq', 'lfq', 'bsq'"),
        (dict(levels=()), r"levels is \(\)"),
        (dict(levels=(8, 2)), r"levels is \(8, 2\); each must be at least 3"),
        (dict(entropy_weight=-1.0), "entropy_weight is -1.0; it must be 0 or more"),
        (dict(entropy_gamma=-0.1), "entropy_gamma"),
        (dict(commit_weight=-0.1), "commit_weight"),
        (dict(tau=0.0), "tau is 0.0; it must be positive"),
        (dict(warmup_noise=1.5), "warmup_noise is 1.5; it must be from 0 to 1"),
    ],
)
def test_wrong_configs_name_the_option(options, message):
    with pytest.raises(UserError, match=f"model.codes.{message}"):
        CodesConfig(**options)


def test_channels_agree_with_levels():
    assert [channels(config, 5) for config in (FSQ, LFQ, BSQ, CodesConfig())] == [5, 5, 5, 5]
    assert [channels(config, 16) for config in (LFQ, BSQ, CodesConfig())] == [16, 16, 16]
    message = r"model.latent_channels is 16; with model.codes.levels \(7, 5, 5, 5, 5\) it must be 5"
    for function in (channels, codebook_size):
        with pytest.raises(UserError, match=message):
            function(FSQ, 16)
    with pytest.raises(UserError, match="latent_channels is 6"):
        quantize(FSQ, latents(6))
    with pytest.raises(UserError, match="name is 'none'"):
        codebook_size(CodesConfig(), 4)
