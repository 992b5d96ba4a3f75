"""CRATE's blocks: parity with the formulas of the official code in NumPy, and the theory that they come from.

The NumPy below is written from the papers' formulas (2306.01129, 2404.02446), in float64.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.models.crate_blocks import (
    Ista,
    Modulation,
    Where,
    block,
    block_specs,
    compress,
    decoder_block,
    decoder_block_specs,
    dictionary_specs,
    ista,
    mssa,
    mssa_specs,
)
from sora_jax.nn.lora import adapter_specs, merge_adapters
from sora_jax.nn.params import count, init
from sora_jax.nn.positions import rotary_angles

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments" / "crate"))
from rates import coding_rate, nonzero_share, subspace_rate, subspace_rate_gradient, subspaces_of

WIDTH, HEADS, TOKENS = 12, 2, 7
INSIDE = WIDTH // HEADS


@pytest.fixture(scope="module")
def rng():
    return np.random.default_rng(0)


def one_clip(tokens: int) -> Where:
    return Where(jnp.ones((1, tokens), jnp.int32))


def arrays(params: dict) -> dict:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


# --- the official code's formulas, for one sequence x (N, d) ---


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def reference_mssa(p, x):
    """w = x W^T is q, k and v; out = softmax(w w^T / sqrt(p)) w per head; a linear layer with bias."""
    heads = []
    for k in range(HEADS):
        w = x @ p["subspaces"]["weight"][:, 0, k]
        scores = w @ w.T * w.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ w)
    together = np.concatenate(heads, -1)
    return together @ p["merge"]["weight"].reshape(-1, x.shape[-1]) + p["merge"]["bias"]


def reference_ista(D, x, eta=0.1, lam=0.1):
    x1 = x @ D.T
    return np.maximum(x + eta * (x @ D - x1 @ D) - eta * lam, 0)


def reference_block(p, x, eta=0.1, lam=0.1):
    half = x + reference_mssa(p["mssa"], layer_norm(p["norm1"], x))
    return reference_ista(p["dictionary"]["weight"], layer_norm(p["norm2"], half), eta, lam)


def reference_decoder_block(p, y):
    v = layer_norm(p["norm1"], y) @ p["synthesis"]["weight"]
    return v - reference_mssa(p["mssa"], layer_norm(p["norm2"], v))


def test_a_block_is_that_of_the_official_code(randomised, rng):
    params = randomised(block_specs(WIDTH, HEADS))
    x = rng.standard_normal((TOKENS, WIDTH), np.float32)
    found = block(params, x[None], one_clip(TOKENS), Ista(0.2, 0.5))[0]
    assert_near(found, reference_block(arrays(params), x, 0.2, 0.5))
    assert 0.1 < (np.asarray(found) == 0).mean() < 0.9  # sparse
    assert np.abs(found - block(params, x[None], one_clip(TOKENS))[0]).max() > 1e-3  # its constants matter


def test_a_block_of_the_decoder_is_that_of_crate_mae(randomised, rng):
    params = randomised(decoder_block_specs(WIDTH, HEADS))
    y = np.maximum(rng.standard_normal((TOKENS, WIDTH), np.float32), 0)
    assert_near(decoder_block(params, y[None], one_clip(TOKENS))[0], reference_decoder_block(arrays(params), y))


def test_a_block_has_three_squares_and_five_widths():
    for specs in (block_specs, decoder_block_specs):
        assert count(specs(WIDTH, HEADS)) == 3 * WIDTH**2 + 5 * WIDTH


def test_tokens_of_other_clips_are_not_seen(randomised, rng):
    params = randomised(block_specs(WIDTH, HEADS))
    x = rng.standard_normal((1, TOKENS, WIDTH), np.float32)
    segments = np.array([[1, 2, 1, 1, 2, 0, 2]])
    together = block(params, x, Where(jnp.asarray(segments)))
    for segment in (1, 2):
        own = x[segments == segment]
        assert_near(together[0][segments[0] == segment], reference_block(arrays(params), own))


def test_rotary_positions_turn_the_subspaces(randomised, rng):
    """A token at place i is projected on U_k R_i^T, as queries, keys and values, and comes back by R_i."""
    params = randomised(mssa_specs(WIDTH, HEADS))
    x = rng.standard_normal((TOKENS, WIDTH), np.float32)
    coords = rng.integers(0, 5, (1, TOKENS, 3)).astype(np.float32)
    angles = rotary_angles(coords, INSIDE, 100.0)
    found = mssa(params, x[None], one_clip(TOKENS)._replace(angles_BLK=angles))[0]
    p, half, total = arrays(params), INSIDE // 2, 0
    for k in range(HEADS):
        turned = []
        for i in range(TOKENS):
            cos, sin = (np.diag(f(np.asarray(angles[0, i], np.float64))) for f in (np.cos, np.sin))
            turned.append(np.block([[cos, -sin], [sin, cos]]))
        w = np.stack([turn @ (x[i] @ p["subspaces"]["weight"][:, 0, k]) for i, turn in enumerate(turned)])
        weights = np.exp(w @ w.T * INSIDE**-0.5)
        out = weights / weights.sum(-1, keepdims=True) @ w
        back = np.stack([turn.T @ row for turn, row in zip(turned, out, strict=True)])
        assert half * 2 == back.shape[1]
        total = total + back @ p["merge"]["weight"][k]
    assert_near(found, total + p["merge"]["bias"])
    moved = rotary_angles(coords + 3, INSIDE, 100.0)
    assert_near(mssa(params, x[None], one_clip(TOKENS)._replace(angles_BLK=moved))[0], found)


def test_initial_values_are_those_of_the_official_code():
    """D is Kaiming uniform, variance 2 / d; linear layers are uniform with variance 1 / (3 d)."""
    d = 64
    params = init(block_specs(d, 4), jax.random.key(0))
    for weight, variance in (
        (params["dictionary"]["weight"], 2 / d),
        (params["mssa"]["subspaces"]["weight"], 1 / (3 * d)),
        (params["mssa"]["merge"]["weight"], 1 / (3 * d)),
    ):
        assert np.asarray(weight).var() == pytest.approx(variance, rel=0.05)
        assert np.abs(weight).max() == pytest.approx(np.sqrt(3 * variance), rel=0.01)


def test_adapters_of_the_dictionary_act_in_both_products(rng):
    """A low-rank adapter of D gives what D with the adapter added gives."""
    specs = dictionary_specs(WIDTH)
    params = init(specs | adapter_specs(specs["weight"], 2), jax.random.key(0))
    params |= {"lora_b": jnp.asarray(rng.standard_normal((2, WIDTH), np.float32)), "lora_scale": jnp.float32(0.5)}
    x = rng.standard_normal((1, TOKENS, WIDTH), np.float32)
    assert_near(ista(params, x), ista(merge_adapters(params), x))
    assert np.abs(ista(params, x) - ista({"weight": params["weight"]}, x)).max() > 1e-3


# --- the theory ---


def subspaces(rng, K: int, d: int, p: int) -> np.ndarray:
    """K subspaces of p dimensions at right angles to each other, (K, d, p)."""
    basis = np.linalg.qr(rng.standard_normal((d, K * p)))[0]
    return np.moveaxis(basis.reshape(d, K, p), 1, 0).astype(np.float32)


def tied(U: np.ndarray) -> dict:
    """MSSA whose projection is U and whose output projection is U back."""
    K, d, p = U.shape
    weight = jnp.asarray(np.moveaxis(U, 0, 1)[:, None])
    return {
        "subspaces": {"weight": weight},
        "merge": {"weight": jnp.asarray(np.swapaxes(U, 1, 2)), "bias": jnp.zeros(d)},
    }


def closed_form(x, U, sigma):
    """The denoiser of 2306.01129 for small sigma: project on each subspace, weigh by a softmax of energies, add up."""
    inside = np.einsum("nd,kdp->nkp", x, U)
    energy = (inside**2).sum(-1) / (2 * sigma**2)
    weights = np.exp(energy - energy.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("nk,nkp,kdp->nd", weights, inside, U), weights


def test_of_one_token_mssa_is_the_closed_form_with_equal_weights(rng):
    """With N = 1, kappa = 1 and eps = sqrt(p / N) the step is MSSA alone, sum_k U_k U_k^T x.

    The closed form weighs the same projections by a softmax. So the two agree on a token that lies in a subspace, and
    with noise they differ by its part in the other subspaces.
    """
    K, d, p, sigma = 3, 12, 3, 1e-3
    U = subspaces(rng, K, d, p)
    of = rng.integers(0, K, 20)
    z = np.einsum("ndp,np->nd", U[of], rng.standard_normal((20, p))).astype(np.float32)
    x = z + sigma * rng.standard_normal(z.shape).astype(np.float32)
    each_alone = Where(jnp.arange(1, 21)[None])
    found = np.asarray(mssa(tied(U), x[None], each_alone)[0])
    assert_near(found, np.einsum("nd,kdp,kep->ne", x, U, U))
    denoised, weights = closed_form(x, U, sigma)
    assert (weights[np.arange(20), of] > 1 - 1e-6).all()
    others = np.einsum("nk,nd,kdp,kep->ne", 1 - weights, x, U, U)
    assert_near(found - denoised, others, tolerance=1e-3)
    clean = np.asarray(mssa(tied(U), z[None], each_alone)[0])
    assert_near(clean, closed_form(z, U, sigma)[0])


def test_the_closed_form_is_the_posterior_mean_for_small_noise(rng):
    """Tweedie's formula: x + sigma^2 grad log q(x), by autodiff of the density of the mixture."""
    K, d, p = 3, 8, 2
    U, of = subspaces(rng, K, d, p).astype(np.float64), rng.integers(0, K, 8)
    z = np.einsum("ndp,np->nd", U[of], rng.standard_normal((8, p)))
    noise = rng.standard_normal(z.shape)
    errors = []
    for sigma in (0.1, 0.03):
        x = z + sigma * noise
        covariances = np.einsum("kdp,kep->kde", U, U) + sigma**2 * np.eye(d)
        precisions = np.linalg.inv(covariances)

        def log_density(x, precisions=precisions):  # all determinants are equal
            return jax.nn.logsumexp(-0.5 * jnp.einsum("d,kde,e->k", x, precisions, x))

        with jax.enable_x64(True):
            score = jax.vmap(jax.grad(log_density))(jnp.asarray(x))
        exact = x + sigma**2 * np.asarray(score)
        errors.append(np.abs(closed_form(x, U, sigma)[0] - exact).max())
    assert errors[1] < 0.01 and errors[1] < 0.2 * errors[0]  # of order sigma^2


def test_the_gradient_of_the_rate_is_that_of_autodiff(rng):
    Z, U = rng.standard_normal((8, 5)).astype(np.float32), subspaces(rng, 2, 8, 3)
    assert_near(subspace_rate_gradient(Z, U, 0.5), jax.grad(lambda Z: subspace_rate(Z, U, 0.5))(Z), tolerance=1e-4)


def test_rates_in_closed_form(rng):
    """Orthonormal tokens have rate N/2 log(1 + d / (N eps^2)); for N < d and N > d it is one formula."""
    d, n, eps = 8, 5, 0.5
    Z = np.linalg.qr(rng.standard_normal((d, n)))[0].astype(np.float32)
    assert coding_rate(Z, eps) == pytest.approx(n / 2 * np.log(1 + d / (n * eps**2)), rel=1e-4)
    wide = rng.standard_normal((d, 20)).astype(np.float32)
    direct = 0.5 * np.linalg.slogdet(np.eye(20) + d / (20 * eps**2) * wide.T.astype(np.float64) @ wide)[1]
    assert coding_rate(wide, eps) == pytest.approx(direct, rel=1e-4)
    whole = np.eye(d, dtype=np.float32)[None]
    assert subspace_rate(Z, whole, eps) == pytest.approx(float(coding_rate(Z, eps)), rel=1e-4)
    assert nonzero_share(np.array([[0.0, 1.0], [0.0, 0.0]])) == 0.25


def test_the_step_of_compression_lowers_the_rate(rng):
    """A gradient step x - kappa grad R_c lowers R_c, and MSSA with tied weights points down that gradient.

    To first order the gradient is U_k U_k^T Z minus what tokens share, and softmax attention is that share.
    """
    U = subspaces(rng, 2, 8, 3)
    Z = rng.standard_normal((8, 6)).astype(np.float32)
    down = Z - 0.1 * subspace_rate_gradient(Z, U, 1.0)
    assert subspace_rate(down, U, 1.0) < subspace_rate(Z, U, 1.0)
    inside = np.einsum("kdp,kep,en->dn", U, U, Z)
    step = np.asarray(mssa(tied(U), Z.T[None], one_clip(6))[0]).T - inside  # towards what similar tokens have
    slope = np.asarray(subspace_rate_gradient(Z, U, 1.0))
    assert (step * slope).sum() < 0
    assert subspace_rate(Z + 0.1 * step, U, 1.0) < subspace_rate(Z, U, 1.0)


def lasso(z, x, D, lam):
    """1/2 |x - D z|^2 + lambda |z|_1 of each row."""
    return 0.5 * ((x - z @ D.T) ** 2).sum(-1) + lam * np.abs(z).sum(-1)


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_ista_is_a_proximal_step(rng, eta):
    """With an orthogonal D a step of length at most 1 never raises the objective; of length 1 it solves it."""
    D = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    x = np.abs(rng.standard_normal((50, WIDTH), np.float32))  # a non-negative code, from which the step starts
    z = np.asarray(ista({"weight": D}, x[None], Ista(eta, 0.3))[0])
    assert (z >= 0).all()
    before, after = lasso(x, x, D, 0.3), lasso(z, x, D, 0.3)
    assert (after < before).all()
    best = np.maximum(x @ D - 0.3, 0)
    assert (lasso(best, x, D, 0.3) <= after + 1e-5).all()
    if eta == 1.0:
        assert_near(z, best)


def test_subspaces_are_read_off_the_weights(rng):
    U = subspaces(rng, 3, 12, 3)
    stretched = tied(U * np.float32(2.5))
    found = np.asarray(subspaces_of(stretched))
    assert_near(np.einsum("kdp,kep->kde", found, found), np.einsum("kdp,kep->kde", U, U))


def test_modulation_at_its_start_changes_nothing_and_the_step_can_be_closed(randomised, rng):
    params = randomised(block_specs(WIDTH, HEADS))
    x = rng.standard_normal((1, TOKENS, WIDTH), np.float32)
    zero = jnp.zeros((1, 1, WIDTH))
    plain = compress(params, x, one_clip(TOKENS))
    assert_near(compress(params, x, one_clip(TOKENS), Modulation(*[zero] * 5)), plain)
    np.testing.assert_array_equal(compress(params, x, one_clip(TOKENS), Modulation(step1=zero - 1)), x)
