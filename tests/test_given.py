"""Given tokens: what training draws, and what the sampler keeps, against the exact model of Gaussian clips."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures_diffusion import quick_jit
from scipy.stats import chisquare

from sora_jax.data.packing.packs import EmptyItem, PackingConfig, pack_batch
from sora_jax.diffusion.given import Given
from sora_jax.diffusion.guidance import GuidanceConfig, TokenLayout, guided
from sora_jax.diffusion.keys import Purpose, clip_keys, step_key
from sora_jax.diffusion.process import linear_flow
from sora_jax.diffusion.sampling import SamplingConfig, sample
from sora_jax.diffusion.solvers import SOLVERS, Problem, SolverConfig
from sora_jax.diffusion.times import TimesConfig
from sora_jax.errors import UserError
from sora_jax.nn.pack import Pack
from sora_jax.train.given import KINDS, GivenConfig, _kinds, draw_given

# ----------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------

SHARES = dict(first=0.15, last=0.1, ends=0.1, frames=0.15, boxes=0.2, levels=0.1)
MIX = GivenConfig(**SHARES, noise=0.3)
SIZES = [(5, 4, 3), (1, 6, 6), (4, 2, 5), (2, 3, 3)]
ROWS = 6
ONLY = {kind: GivenConfig(**{kind: 1.0}) for kind in KINDS}


def packs_of(rows, slots=4, length=200) -> Pack:
    """Packs of clips of the sizes given, by clip id."""
    items = [[EmptyItem(size, clip_id, np.array([1])) for size, clip_id in row] for row in rows]
    return Pack(**pack_batch(items, PackingConfig(length, slots, 8, (1, 1, 1), rows_per_clip=ROWS)))


@pytest.fixture(scope="module")
def many():
    return packs_of([[(SIZES[i], 4 * row + i + 1) for i in range(4)] for row in range(64)])


@functools.partial(quick_jit, static_argnums=0)
def draw(config, pack, step):
    keys = step_key(3, step, Purpose.GIVEN), step_key(3, step, Purpose.FRAME_TIMES)
    times_BS = jnp.full(pack.clip_ids_BS.shape, 0.625)
    return draw_given(config, TimesConfig(base_tokens=0), linear_flow, keys, pack, times_BS)


def by_clip(pack, values_BL):
    """Values of the tokens of each clip, as (t, h, w), in order of packs and slots."""
    for b, grids in enumerate(np.asarray(pack.grids_BS3)):
        for slot, grid in enumerate(grids):
            if grid.all():
                yield np.asarray(values_BL)[b][np.asarray(pack.segments_BL)[b] == slot + 1].reshape(grid)


def token_times(pack, drawn):
    return np.take_along_axis(np.asarray(drawn.times_BR), np.asarray(drawn.rows_BL), 1)


def test_shares_are_those_of_the_config_within_three_deviations(many):
    """All of a clip at one level: nothing is given. The rest is told from its masks and levels."""
    counts = {"none": 0, "levels": 0, "given": 0, "clean": 0, "noise": 0}
    clips = 0
    for step in range(80):
        drawn = draw(MIX, many, step)
        pairs = zip(by_clip(many, drawn.given_BL), by_clip(many, token_times(many, drawn)), strict=True)
        for given, t in pairs:
            if given.shape[0] == 1:
                continue
            clips += 1
            known = t[given]
            counts["given"] += given.any()
            counts["none"] += bool((t == 0.625).all())
            counts["levels"] += (~given.any()) and len(np.unique(t)) > 1
            counts["clean"] += given.any() and (known == 0).all()
            counts["noise"] += given.any() and (known > 0).all() and (known <= 0.2).all()
    assert clips == 80 * 64 * 3
    masks = sum(SHARES.values()) - SHARES["levels"]
    expected = {"none": 0.2, "levels": 0.1, "given": masks, "clean": 0.7 * masks, "noise": 0.3 * masks}
    # A box may be as large as the frame of a small clip, and then nothing is given.
    slack = {"none": 0.01, "levels": 0.0, "given": 0.01, "clean": 0.005, "noise": 0.002}
    for name, share in expected.items():
        deviation = np.sqrt(share * (1 - share) / clips)
        assert abs(counts[name] / clips - share) < 3 * deviation + slack[name], name


def test_each_kind_has_its_share_by_chi_squared(many):
    """Draw for 15,360 clips; images have boxes or nothing."""
    keys = [clip_keys(step_key(3, step, Purpose.GIVEN), jnp.asarray(many.clip_ids_BS)) for step in range(60)]
    u_NS = np.concatenate([jax.vmap(jax.vmap(jax.random.uniform))(key) for key in keys])
    frames_NS = np.tile(np.asarray(many.grids_BS3)[..., 0], (60, 1))
    kinds_NS = np.asarray(_kinds(MIX, jnp.asarray(u_NS), jnp.asarray(frames_NS)))
    assert set(np.unique(kinds_NS[frames_NS == 1])) == {KINDS.index("boxes"), len(KINDS)}
    counts = np.bincount(kinds_NS[frames_NS > 1], minlength=len(KINDS) + 1)
    shares = [getattr(MIX, kind) for kind in KINDS]
    expected = counts.sum() * np.array([*shares, 1 - sum(shares)])
    assert chisquare(counts, expected).pvalue > 1e-3
    assert chisquare(counts[[1, 0, *range(2, len(counts))]], expected).pvalue < 1e-6, "kinds may not be exchanged"


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_of_their_kind_and_leave_something_to_learn(kind, many):
    seen = set()
    for step in range(8):
        drawn = draw(ONLY[kind], many, step)
        for given, t in zip(by_clip(many, drawn.given_BL), by_clip(many, token_times(many, drawn)), strict=True):
            frames = given.all((1, 2))
            assert not given.all(), "nothing is left to learn"
            assert (t[~given] > 0).all() and (kind == "levels" or (t[~given] == 0.625).all())
            if len(given) == 1 and kind != "boxes":
                assert not given.any(), "an image has no frames to give"
                continue
            if kind != "boxes":
                np.testing.assert_array_equal(given, np.broadcast_to(frames[:, None, None], given.shape))
            seen.add(tuple(frames.tolist()))
            changes = np.flatnonzero(np.diff(frames))
            if kind == "first":
                assert frames[0] and len(changes) == 1
                assert frames.sum() <= max(1, len(frames) // 2)
            if kind == "last":
                assert frames[-1] and len(changes) == 1
            if kind == "ends":
                assert frames[0] and len(changes) == (2 if frames[-1] else 1)
                assert frames[-1] or len(frames) == 2
            if kind == "levels":
                assert not given.any() and len(np.unique(t)) == len(t) == len(np.unique(t[:, 0, 0]))
            if kind == "boxes":
                for box in (given, ~given):
                    if _is_box(box):
                        break
                else:
                    pytest.fail("neither what is given nor the rest is a box")
    assert len(seen) >= (1 if kind in ("levels", "boxes") else 3)


def _is_box(inside) -> bool:
    places = np.argwhere(inside)
    return len(places) == np.prod(np.ptp(places, axis=0) + 1) if len(places) else True


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_a_fixed_number_of_first_frames_is_given_of_every_clip(frames, many):
    drawn = draw(GivenConfig(first=1.0, first_frames=frames, noise=0.0), many, 0)
    for given, times in zip(by_clip(many, drawn.given_BL), by_clip(many, token_times(many, drawn)), strict=True):
        known = min(frames, len(given) - 1)  # of an image nothing, and one frame is always left to learn
        assert given[:known].all() and not given[known:].any()
        assert (times[given] == 0).all() and (times[~given] == 0.625).all()


def test_a_third_of_the_levels_rise_with_time(many):
    rising = total = 0
    for step in range(12):
        for t in by_clip(many, token_times(many, draw(ONLY["levels"], many, step))):
            if len(t) == 5:
                total, rising = total + 1, rising + bool((np.diff(t[:, 0, 0]) > 0).all())
    share = 1 / 3 + 2 / 3 / 120  # by chance one of 5! orders
    assert abs(rising / total - share) < 3 * np.sqrt(share * (1 - share) / total)


def test_a_draw_belongs_to_seed_step_and_clip(many):
    """The same clips in other packs, slots and company draw the same; another step draws anew."""
    there = {}
    drawn = draw(MIX, many, 5)
    times = token_times(many, drawn)
    for clip_id, given, t in zip(
        np.asarray(many.clip_ids_BS).ravel(), by_clip(many, drawn.given_BL), by_clip(many, times), strict=True
    ):
        there[int(clip_id)] = given, t
    order = np.random.default_rng(0).permutation(256)
    rows = [[(SIZES[i % 4], int(i) + 1) for i in order[start : start + 3]] for start in range(0, 256, 3)]
    mixed = packs_of(rows)
    again, other = draw(MIX, mixed, 5), draw(MIX, mixed, 6)
    ids = np.asarray(mixed.clip_ids_BS).ravel()
    found = zip(ids[ids > 0], by_clip(mixed, again.given_BL), by_clip(mixed, token_times(mixed, again)), strict=True)
    for clip_id, given, t in found:
        np.testing.assert_array_equal(given, there[int(clip_id)][0])
        np.testing.assert_array_equal(t, there[int(clip_id)][1])
    assert (np.asarray(again.given_BL) != np.asarray(other.given_BL)).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(first=-0.1), "diffusion.given.first is -0.1; it must be from 0 to 1"),
        (dict(first=0.6, boxes=0.6), "add up to 1.2; it must be at most 1"),
        (dict(noise=1.5), "diffusion.given.noise is 1.5; it must be from 0 to 1"),
    ],
)
def test_shares_are_checked(changes, message):
    with pytest.raises(UserError, match=message):
        GivenConfig(**changes)


# ----------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------

FRAMES, RHO = 4, 0.9
COVARIANCE = RHO ** np.abs(np.subtract.outer(np.arange(FRAMES), np.arange(FRAMES)))
VALUES = np.array([1.0, 0.5, -0.5, -1.0], np.float32)
TIMES = TimesConfig(base_tokens=0)
CLIPS = 20_000


def exact(x_BLP, t_BR):
    """The exact model of Gaussian clips, whose frames may all have different levels, of one clip's times for all."""
    t = t_BR[0]
    a, b = jnp.diag(1.0 - t), jnp.diag(t)
    gain = COVARIANCE @ a @ jnp.linalg.inv(a @ COVARIANCE @ a + b @ b)
    x0 = jnp.einsum("ij,bjp->bip", gain, x_BLP)
    safe = jnp.where(t > 0, t, 1.0)[None, :, None]
    eps = jnp.where(t[None, :, None] > 0, (x_BLP - (1.0 - t)[None, :, None] * x0) / safe, 0.0)
    return eps - x0


@functools.partial(quick_jit, static_argnames=("steps", "solver", "seed", "denoise"))
def gaussian(steps, solver, x0_BLP, ceilings, seed=0, denoise=exact):
    """Samples (clips, frames): a row for each frame, with these ceilings."""
    shape = x0_BLP.shape[:2]
    rows_BL = jnp.broadcast_to(jnp.arange(FRAMES), shape)
    noise = lambda step: jax.random.normal(step_key(seed, step, Purpose.SOLVER), x0_BLP.shape)  # noqa: E731
    problem = Problem(denoise, "velocity", linear_flow, rows_BL, noise)
    alone = jnp.all(ceilings == ceilings[0])
    given = Given(x0_BLP, jnp.broadcast_to(ceilings, shape), jnp.broadcast_to(alone, shape).astype(jnp.float32))
    eps_BLP = jax.random.normal(step_key(seed, 0, Purpose.SAMPLE), x0_BLP.shape)
    config = SamplingConfig(str(steps), solver=SolverConfig(solver))
    return sample(config, TIMES, problem, eps_BLP, jnp.ones(shape, jnp.int32), given)[..., 0]


def conditional(known):
    """Mean and covariance of the other frames, given VALUES of the known ones."""
    made = ~known
    gain = COVARIANCE[np.ix_(made, known)] @ np.linalg.inv(COVARIANCE[np.ix_(known, known)])
    return gain @ VALUES[known], COVARIANCE[np.ix_(made, made)] - gain @ COVARIANCE[np.ix_(known, made)]


MASKS = {"first": [1, 0, 0, 0], "last": [0, 0, 1, 1], "both": [1, 0, 0, 1], "middle": [0, 1, 0, 0]}


@pytest.mark.parametrize("mask", MASKS)
def test_made_frames_have_the_distribution_of_the_conditional(mask):
    known = np.array(MASKS[mask], bool)
    x0_BLP = jnp.broadcast_to(jnp.asarray(VALUES * known)[None, :, None], (CLIPS, FRAMES, 1))
    found = np.asarray(gaussian(100, "euler", x0_BLP, jnp.asarray(1.0 - known)))
    np.testing.assert_array_equal(found[:, known], np.broadcast_to(VALUES[known], (CLIPS, known.sum())))
    mean, covariance = conditional(known)
    np.testing.assert_allclose(found[:, ~known].mean(0), mean, atol=0.02)
    np.testing.assert_allclose(found[:, ~known].var(0), np.diag(covariance), rtol=0.08)


def test_putting_known_frames_back_at_every_step_does_not_condition():
    """The test above can fail: replacement, the way of models that know one level, misses the mean by far."""
    known = jnp.asarray(MASKS["first"], bool)[None, :, None]
    x0_BLP = jnp.broadcast_to(jnp.asarray(VALUES)[None, :, None], (CLIPS, FRAMES, 1))
    eps_BLP = jax.random.normal(jax.random.key(1), x0_BLP.shape)

    def replaced(x_BLP, t_BR):
        t = t_BR[0][None, :, None]
        return exact(jnp.where(known, (1.0 - t) * x0_BLP + t * eps_BLP, x_BLP), t_BR)

    found = gaussian(100, "euler", x0_BLP, jnp.ones(FRAMES), denoise=replaced)
    assert abs(float(found[:, 1].mean()) - 0.9) > 0.3


CEILINGS = {  # the correlation of each frame of the result with the same frame of the input, from the study
    (0.2,) * 4: [(0.96, 0.98)] * 4,
    (0.5,) * 4: [(0.79, 0.86)] * 4,
    (0.8,) * 4: [(0.35, 0.42)] * 4,
    (0.5, 1.0, 1.0, 1.0): [(0.63, 0.69), (0.42, 0.48), (0.32, 0.38), (0.25, 0.31)],
}


@pytest.mark.parametrize("ceilings", CEILINGS)
def test_edits_keep_the_distribution_and_follow_their_input_by_strength(ceilings):
    root = np.linalg.cholesky(COVARIANCE)
    inputs = np.random.default_rng(0).normal(size=(CLIPS, FRAMES)) @ root.T
    found = np.asarray(gaussian(100, "euler", jnp.asarray(inputs[..., None], jnp.float32), jnp.asarray(ceilings)))
    np.testing.assert_allclose(np.cov(found.T), COVARIANCE, atol=0.05)
    for frame, (low, high) in enumerate(CEILINGS[ceilings]):
        assert low <= np.corrcoef(found[:, frame], inputs[:, frame])[0, 1] <= high


SOLVER_CASES = {name: SolverConfig(name, eta=0.5, churn=3.0) for name in SOLVERS}


@functools.cache
def packed_problem(rescale):
    """A pack of three clips, a model that mixes all tokens of a clip, guided; its known tokens and their rows."""
    rng = np.random.default_rng(2)
    sizes = [(3, 2, 2), (1, 2, 2), (2, 2, 3)]
    pack = Pack(**pack_batch([[EmptyItem(s, i + 1, np.array([1])) for i, s in enumerate(sizes)]],
                             PackingConfig(32, 4, 8, (1, 1, 1), rows_per_clip=2)))  # fmt: skip
    weights = jnp.asarray(0.4 * rng.normal(size=(6, 6)), jnp.float32)
    same_BLL = (pack.segments_BL[:, :, None] == pack.segments_BL[:, None, :]) / 12.0

    def model(bias, x_BLP, t_BR):
        mixed = x_BLP + jnp.einsum("blm,bmp->blp", same_BLL, x_BLP)
        return jnp.tanh(mixed @ weights + bias) * (1.0 + jnp.take_along_axis(t_BR, rows_BL, 1)[..., None])

    given_BL = (pack.index_BL < 4) & (pack.segments_BL != 2) & (pack.segments_BL > 0)
    rows_BL = jnp.asarray(pack.rows_BL + given_BL)
    layout = TokenLayout(jnp.asarray(pack.segments_BL), rows_BL, 6)
    config = GuidanceConfig(rescale=rescale)
    scales = jnp.asarray([[3.0, 1.5, 4.0, 1.0]])
    denoise = guided(config, functools.partial(model, 0.1), functools.partial(model, -0.3), scales, layout)
    x0_BLP = jnp.asarray(rng.normal(size=(1, 32, 6)), jnp.float32) * given_BL[..., None]
    return pack, rows_BL, given_BL, denoise, x0_BLP


@functools.partial(quick_jit, static_argnums=(0, 1, 2))
def solved(solver, rescale, knows, ceiling_BR, x0_BLP, eps_BLP):
    pack, rows_BL, _, denoise, _ = packed_problem(rescale)
    noise = lambda step: jax.random.normal(step_key(1, step, Purpose.SOLVER), x0_BLP.shape)  # noqa: E731
    problem = Problem(denoise, "velocity", linear_flow, rows_BL, noise)
    given = Given(x0_BLP, ceiling_BR, jnp.zeros_like(ceiling_BR)) if knows else None
    return sample(SamplingConfig("6", solver=solver), TIMES, problem, eps_BLP, jnp.ones((1, 8), jnp.int32), given)


@pytest.mark.parametrize("solver", SOLVERS)
def test_given_tokens_stay_to_the_bit_and_ceilings_of_1_are_the_plain_sample(solver):
    """With guidance and rescaling, which must not see given tokens, and with noise drawn at every step."""
    rescale = 0.7
    _, _, given_BL, _, x0_BLP = packed_problem(rescale)
    eps_BLP = jax.random.normal(jax.random.key(0), x0_BLP.shape)
    held = jnp.asarray([[1.0, 0.0] * 4])
    run = functools.partial(solved, SOLVER_CASES[solver], rescale)
    found = np.asarray(run(True, held, x0_BLP, eps_BLP))
    np.testing.assert_array_equal(found[given_BL], np.asarray(x0_BLP)[given_BL])
    assert np.isfinite(found).all()
    assert not np.allclose(found[~given_BL], np.asarray(eps_BLP)[~given_BL])
    plain = np.asarray(run(False, held, x0_BLP, eps_BLP))
    everything = np.asarray(run(True, jnp.ones((1, 8)), x0_BLP, eps_BLP))
    np.testing.assert_allclose(everything, plain, rtol=1e-5, atol=2e-6)  # another program, which may round otherwise
    # What the given tokens are changes the clips that have some, and leaves the image of the pack as it is.
    other = np.asarray(run(True, held, x0_BLP + 1.0, eps_BLP))
    image = np.asarray(packed_problem(rescale)[0].segments_BL)[0] == 2
    np.testing.assert_allclose(other[0, image], found[0, image], atol=1e-6)
    made = (~given_BL[0]) & np.isin(np.asarray(packed_problem(rescale)[0].segments_BL)[0], (1, 3))
    assert np.abs(other[0, made] - found[0, made]).max() > 1e-2


def test_strength_0_is_the_input_and_strength_1_the_plain_sample_and_between_it_grows():
    inputs = np.random.default_rng(1).normal(size=(64, FRAMES, 1)).astype(np.float32)
    strengths = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    found = [np.asarray(gaussian(30, "dpm2", inputs, jnp.full(FRAMES, s), 4)) for s in strengths]
    np.testing.assert_array_equal(found[0], inputs[..., 0])
    np.testing.assert_array_equal(found[-1], np.asarray(gaussian(30, "dpm2", 0 * inputs, jnp.ones(FRAMES), 4)))
    distances = [np.square(result - inputs[..., 0]).mean() for result in found]
    assert (np.diff(distances) > 0).all(), distances


def test_dataclass_default_gives_nothing():
    config = GivenConfig()
    assert config.any == 0 and not any(getattr(config, f.name) for f in dataclasses.fields(config)[:6])
