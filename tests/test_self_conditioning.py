"""Self-conditioning: two passes in training, the estimate of the step before in sampling, and who carries it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_far, assert_near

from sora_jax.data.feeding.tokenizer import Tokenizer, TokenizerConfig
from sora_jax.data.packing.packs import PackingConfig
from sora_jax.diffusion.guidance import GuidanceConfig
from sora_jax.diffusion.prediction import from_x0_and_eps
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.self_conditioning import Estimate, in_two_passes
from sora_jax.diffusion.solvers import Problem, SolverConfig, ddim
from sora_jax.errors import UserError
from sora_jax.generate.estimates import remembering
from sora_jax.generate.long import Windows, sample_long, windows_of
from sora_jax.generate.packs import TrainedDenoiser
from sora_jax.generate.progress import Watch
from sora_jax.generate.requests import Known, Request
from sora_jax.generate.sampler import sample_latents
from sora_jax.models.denoiser import denoise, denoiser_specs, forward_flops, reads_estimate, train_flops
from sora_jax.models.text import TextConfig
from sora_jax.models.transformer import TransformerConfig
from sora_jax.models.walt_blocks import WaltConfig
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig, denoiser_loss
from sora_jax.train.state import MODEL

PROCESS = process_named("vp_linear_zero_snr")
ROWS = np.array([[0, 0, 1, 1]])
TIMES = np.array([[0.3, 0.8]], np.float32)
X0, EPS = np.random.default_rng(0).standard_normal((2, 1, 4, 3)).astype(np.float32)


def noisy():
    """Noisy tokens, the perfect prediction, noise levels, and what converts predictions to data."""
    x0, eps, times, rows = map(jnp.asarray, (X0, EPS, TIMES, ROWS))
    t_BL1 = times[:, ROWS[0], None]
    v_BLP = from_x0_and_eps(PROCESS, "v", x0, eps, t_BL1)
    return PROCESS.a(t_BL1) * x0 + PROCESS.b(t_BL1) * eps, v_BLP, times, Estimate(PROCESS, "v", rows)


def test_the_estimate_of_a_perfect_prediction_is_the_data_and_reads_no_variance_values():
    x_BLP, v_BLP, times, estimate = noisy()
    wide = jnp.concatenate([v_BLP, np.full_like(X0, np.nan)], -1)
    np.testing.assert_allclose(estimate(wide, x_BLP, times), X0, rtol=1e-4, atol=1e-5)


def test_the_second_pass_reads_the_first_where_chosen_and_no_gradient_goes_through():
    x_BLP, v_BLP, times, estimate = noisy()
    chosen = jnp.array([True, False, True, False])[None, :, None]
    first = lambda scale, x, t: scale * v_BLP  # noqa: E731

    def output(scale, weight):
        second = lambda x, t, previous: weight * previous  # noqa: E731
        model = in_two_passes(estimate, functools.partial(first, scale), second, chosen)
        return model(x_BLP, times)

    np.testing.assert_allclose(output(1.0, 2.0), np.where(chosen, 2 * X0, 0), rtol=1e-4, atol=1e-5)
    to_first, to_second = jax.grad(lambda *a: output(*a).sum(), (0, 1))(1.0, 2.0)
    assert to_first == 0
    np.testing.assert_allclose(to_second, X0[:, [0, 2]].sum(), rtol=1e-4)


def test_a_solver_reads_the_estimate_of_its_last_step():
    """DDIM with a network that mixes its input with the estimate, against a loop in NumPy."""
    grid = np.float32([1.0, 0.7, 0.4, 0.0])
    times_KBR = np.broadcast_to(grid[:, None, None], (4, 1, 2))
    model = lambda x, t, previous: 0.5 * x - 0.25 * previous  # noqa: E731

    @jax.jit
    def solve(x):
        rows = jnp.asarray(ROWS)
        step = remembering(Estimate(PROCESS, "v", rows), model, jax.new_ref(jnp.zeros_like(x)))
        return ddim(Problem(step, "v", PROCESS, rows), x, jnp.asarray(times_KBR))

    x, previous = EPS.astype(np.float64), np.zeros_like(X0, np.float64)
    for t, s in zip(grid, grid[1:], strict=False):
        a, b, a_s, b_s = (float(f(jnp.float32(u))) for u in (t, s) for f in (PROCESS.a, PROCESS.b))
        v = 0.5 * x - 0.25 * previous
        previous, eps = a * x - b * v, b * x + a * v  # a^2 + b^2 = 1: v is a rotation of both
        x = a_s * previous + b_s * eps
    np.testing.assert_allclose(solve(jnp.asarray(EPS)), x, rtol=1e-4, atol=1e-5)


# --- with a network ---

TEXT = TextConfig(vocabulary=300, width=16, depth=1, head_width=8)
CONFIG = WaltConfig(
    depth=2,
    width=16,
    heads=2,
    patch=(1, 2, 2),
    latent_channels=2,
    spatial_window=(2, 2),
    spatiotemporal_window=(1, 2),
    positions=(2, 2, 2),
    text=TEXT,
    self_conditioning=True,
    remat="none",
    dtype="float32",
)
RUN = DenoiserRun(
    model=CONFIG,
    tokenizer=TokenizerConfig("bytes", max_tokens=16),
    packing=PackingConfig(length=32, slots=4, text_length=32),
    diffusion=DiffusionConfig(process="vp_linear_zero_snr", prediction="v"),
)
# Its bias reaches all tokens: captions and noise levels differ enough.
near = functools.partial(assert_near, tolerance=1e-4)


@pytest.fixture(scope="module")
def params(randomised):
    return jax.device_get(randomised(denoiser_specs(CONFIG), scale=0.15))


def test_only_networks_that_say_so_read_an_estimate(clips, packed):
    assert reads_estimate(CONFIG)
    others = TransformerConfig(), dataclasses.replace(CONFIG, self_conditioning=False)
    assert not any(map(reads_estimate, others))
    batch = {name: x for name, x in vars(packed([clips])).items() if x is not None}
    assert train_flops(CONFIG, batch) == 4 * forward_flops(CONFIG, batch)
    assert train_flops(others[1], batch) == 3 * forward_flops(others[1], batch)
    with pytest.raises(UserError, match="diffusion.self_conditioning is 1.5"):
        DiffusionConfig(self_conditioning=1.5)


def deaf(params):
    """The parameters of a network that hears nothing of its estimate."""
    weight = params["patch"]["weight"] * (np.arange(2 * CONFIG.patch_values) < CONFIG.patch_values)[:, None]
    return params | {"patch": params["patch"] | {"weight": weight}}


@functools.cache
def loss_program(share):
    run = dataclasses.replace(RUN, diffusion=dataclasses.replace(RUN.diffusion, self_conditioning=share))

    def loss(patch, params, pack):
        return denoiser_loss(run, {MODEL: params | {"patch": patch}}, (), pack, 3, 0)[0][MODEL]

    return jax.jit(jax.value_and_grad(loss) if share in (0, 1) else lambda *a: (loss(*a), None))


def losses(share, params, pack):
    """The training loss and its gradient for the patch embedding."""
    total, slope = loss_program(share)(params["patch"], params, pack)
    return float(total), slope


def test_the_share_of_clips_trained_on_an_estimate(params, clips, packed):
    """None: the loss of zeros, whose weights get no gradient. All: those weights matter. One clip: as in a pack."""
    pack = packed([clips[:3]])
    (none, to_none), (every, to_every) = losses(0.0, params, pack), losses(1.0, params, pack)
    P = CONFIG.patch_values
    assert not np.any(to_none["weight"][P:]) and np.all(np.any(to_every["weight"][P:] != 0, -1))
    assert abs(every - none) > 1e-3 * none
    near(losses(1.0, deaf(params), pack)[0], none)
    halves = losses(0.5, params, pack)[0]
    singles = [losses(share, params, packed([[clip]]))[0] for clip in clips[:3] for share in (0.0, 0.5, 1.0)]
    zeros, some, ones = (singles[i::3] for i in range(3))
    nearest = [a if abs(c - a) < abs(c - b) else b for a, b, c in zip(zeros, ones, some, strict=True)]
    near(some, nearest)
    near(halves, sum(some))


FIRST = np.broadcast_to(np.array([0.0, 1.0, 1.0], np.float32)[:, None, None], (3, 4, 4))
LATENT = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
REQUESTS = [
    Request("red", (3, 4, 4), 11, guidance=3.0, known=Known(LATENT, FIRST)),
    Request("a cat", (1, 4, 6), 22, guidance=2.0, negative="blue"),
]


def on_one_device(params, sample, *arguments):
    """sample(model, *arguments), such as `sample_latents`."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return sample(TrainedDenoiser(RUN, jax.device_put(params), Tokenizer(RUN.tokenizer), mesh), *arguments)


def sampled(params, sampling, requests=REQUESTS, watch=Watch()):
    return on_one_device(params, sample_latents, requests, sampling, 5, watch)


DDIM = SamplingConfig(steps="3", solver=SolverConfig("ddim"))


def test_samples_carry_the_estimate_from_step_to_step(params):
    """In packs as alone, in parts as at once; and it is read."""
    together = sampled(params, DDIM)
    for request, z in zip(REQUESTS, together, strict=True):
        near(sampled(params, DDIM, [request])[0], z)
    near(sampled(params, DDIM, watch=Watch(lambda done, total: None)), together)
    assert_far(sampled(deaf(params), DDIM)[1], together[1], 1e-3)
    np.testing.assert_array_equal(together[0][0], LATENT[0])


BY_FRAMES = dataclasses.replace(DDIM, guidance=GuidanceConfig(history=2.0))


def test_guidance_by_given_frames_takes_it_along(params):
    found = sampled(params, BY_FRAMES)
    assert all(np.isfinite(z).all() for z in found)
    near(sampled(params, BY_FRAMES, REQUESTS[:1])[0], found[0])


def test_29_and_41_frames_are_made_17_at_a_time(params):
    """As the paper counts: 5 latents, and 3 more in every round that sees the last frames (2312.06662)."""
    windows = [windows_of(frames, 17, 5, 4) for frames in (29, 41)]
    assert windows == [Windows(8, 5, 1), Windows(11, 5, 1)]
    requests = [Request("red", (8, 4, 4), 11, guidance=3.0)]
    short, long = (on_one_device(params, sample_long, requests, each, 4, BY_FRAMES, 5)[0] for each in windows)
    assert len(short) == 8 and len(long) == 11 and np.isfinite(long).all()
    np.testing.assert_array_equal(long[:8], short)
    plain = on_one_device(params, sample_long, requests, windows[0], 4, DDIM, 5)[0]
    np.testing.assert_array_equal(plain[:5], short[:5])
    assert_far(plain[5:], short[5:], 1e-3)


def test_the_first_step_has_none(params, clips, packed):
    pack = packed([clips[:2]])
    run = jax.jit(
        lambda p, previous: denoise(p, CONFIG, pack, pack.tokens_BLP, jnp.full((1, 4), 0.5), None, None, previous)
    )
    zeros = jnp.zeros_like(pack.tokens_BLP)
    np.testing.assert_array_equal(run(params, None), run(params, zeros))
    assert_far(run(params, zeros + 1), run(params, zeros), 1e-3)
