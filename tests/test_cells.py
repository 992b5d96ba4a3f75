"""Convolutions and norms of packed clips, against those of each clip on a canvas of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import assert_near

from sora_jax.data.packing.packs import PackingConfig
from sora_jax.errors import UserError
from sora_jax.nn.cells import (
    GROUP,
    cells_of,
    children,
    conv,
    frame_mean,
    gather,
    group_norm,
    halved,
    kernel_links,
    parent_links,
    token_links,
)

GRIDS = np.array([[[3, 4, 5], [1, 3, 2], [2, 1, 1]], [[2, 5, 3], [0, 0, 0], [0, 0, 0]]])  # packs of 3 clips and of 1
ROOM = 96


def spans(grids, packs=range(2)):
    """Yield each clip: its pack, its cells there, and its grid."""
    for b in packs:
        start = 0
        for grid in np.asarray(grids[b]):
            if grid.all():
                yield b, slice(start, start + grid.prod()), tuple(grid.tolist())
                start += grid.prod()


def values(channels, seed=0):
    return np.random.default_rng(seed).standard_normal((2, ROOM, channels)).astype(np.float32)


def canvas_conv(params, x_thwC, stride=1):
    """XLA's convolution of a canvas, zeros around it."""
    kernel = {9: (1, 3, 3), 3: (3, 1, 1)}[len(params["weight"])]
    weight = params["weight"].reshape(*kernel, *params["weight"].shape[1:])
    padding = [(side // 2, side // 2) for side in kernel]
    axes = ("NTHWC", "THWIO", "NTHWC")
    found = jax.lax.conv_general_dilated(x_thwC[None], weight, (1, stride, stride), padding, dimension_numbers=axes)
    return found[0] + params["bias"][None, None, None]


def conv_params(taps, inputs=3, outputs=4):
    rng = np.random.default_rng(taps)
    weight, bias = rng.standard_normal((taps, inputs, outputs)), rng.standard_normal(outputs)
    return {"weight": jnp.float32(weight), "bias": jnp.float32(bias)}


@pytest.mark.parametrize("kernel, stride", [((1, 3, 3), 1), ((3, 1, 1), 1), ((1, 3, 3), 2)])
def test_packed_convolutions_are_those_of_each_canvas(kernel, stride):
    """Outputs, and the gradients of inputs and weights."""
    cells, x, params = cells_of(GRIDS, ROOM), values(3), conv_params(np.prod(kernel))
    grids = np.asarray(halved(GRIDS)) if stride == 2 else GRIDS
    weigh = values(4, seed=1)

    @jax.jit
    def packed(params, x):
        links = kernel_links(cells, cells_of(grids, ROOM // stride**2), kernel, stride)
        y = conv(params, x, links)
        return jnp.sum(jnp.sin(y) * weigh[:, : y.shape[1]], where=(np.arange(y.shape[1]) < ends)[..., None]), y

    ends = np.array([[sum(grid.prod() for grid in pack)] for pack in grids])

    @jax.jit
    def apart(params, x):
        total, found = 0.0, []
        for (b, own, grid), (_, target, small) in zip(spans(GRIDS), spans(grids), strict=True):
            y = canvas_conv(params, x[b, own].reshape(*grid, -1), stride)
            assert y.shape[:3] == small
            found.append(y.reshape(-1, 4))
            total += jnp.sum(jnp.sin(found[-1]) * weigh[b, target])
        return total, found

    (_, y), slopes = jax.value_and_grad(packed, (0, 1), has_aux=True)(params, x)
    (_, found), expected = jax.value_and_grad(apart, (0, 1), has_aux=True)(params, x)
    for (b, own, _), clip in zip(spans(grids), found, strict=True):
        assert_near(y[b, own], clip)
    assert_near(slopes, expected)


def test_the_nearest_is_taken_where_resolutions_are_doubled():
    x = values(2)[:, : ROOM // 4]

    @jax.jit
    def doubled(x):
        fine, coarse = cells_of(GRIDS, ROOM), cells_of(halved(GRIDS), ROOM // 4)
        found, back = jax.vjp(lambda x: gather(x, parent_links(coarse, fine))[:, :, 0], x)
        return found, back(jnp.ones_like(found))[0], children(coarse, fine)

    found, slope, covered = doubled(x)
    for (b, own, grid), (_, source, small) in zip(spans(GRIDS), spans(halved(GRIDS)), strict=True):
        up = x[b, source].reshape(*small, 2).repeat(2, 1).repeat(2, 2)[:, : grid[1], : grid[2]]
        np.testing.assert_array_equal(found[b, own], up.reshape(-1, 2))
    counts = (np.asarray(covered) < ROOM).sum(-1)[..., None]
    np.testing.assert_array_equal(slope, np.broadcast_to(counts, slope.shape))


def test_norms_are_those_of_each_frame():
    x = 3 + 2 * values(2 * GROUP)
    params = {"scale": jnp.linspace(0.5, 2, 2 * GROUP), "shift": jnp.linspace(-1, 1, 2 * GROUP)}
    found = jax.jit(lambda x: group_norm(params, x, cells_of(GRIDS, ROOM)))(x)
    for b, own, (t, h, w) in spans(GRIDS):
        frames = x[b, own].reshape(t, h * w, 2, GROUP).astype(np.float64)
        middle, spread = frames.mean((1, 3), keepdims=True), frames.std((1, 3), keepdims=True)
        wanted = ((frames - middle) / np.sqrt(spread**2 + 1e-6)).reshape(t * h * w, -1)
        assert_near(found[b, own], wanted * np.asarray(params["scale"]) + np.asarray(params["shift"]))


def test_the_transpose_of_a_mean_is_itself():
    @jax.jit
    def all_ways(x, y):
        mean = functools.partial(frame_mean, cells=cells_of(GRIDS, ROOM))
        return jax.vjp(mean, x)[1](y)[0], jax.jvp(mean, (x,), (y,))[1], mean(y)

    back, forward, mean = all_ways(values(2), values(2, seed=1))
    assert_near((back, forward), (mean, mean))


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2)])
def test_tokens_come_back_from_their_cells(clips, packed, patch):
    """Shuffled tokens, and a clip whose first frame was left out; every cell holds the latent of its place."""
    pack = packed([clips[:2], clips[2:3]], 100, patch=patch)
    order = np.random.default_rng(0).permutation(100)
    names = ("tokens_BLP", "segments_BL", "coords_BL3")
    pack = pack.replace(**{name: getattr(pack, name)[:, order] for name in names})
    later = (pack.segments_BL == 1)[..., None] * np.float32([1, 0, 0])
    pack = pack.replace(coords_BL3=pack.coords_BL3 + later)
    parts = pack.tokens_BLP.reshape(2, -1, 2)

    @jax.jit
    def there_and_back(pack):
        cells = cells_of(pack.grids_BS3 * np.array([[patch]]), 100 * int(np.prod(patch)))
        to_cells, to_parts = token_links(pack, cells, patch)
        there = gather(parts, to_cells)[:, :, 0]
        return there, gather(there, to_parts)[:, :, 0]

    there, again = there_and_back(pack)
    rows = [clips[0].values.reshape(-1, 2), clips[1].values.reshape(-1, 2)]
    np.testing.assert_array_equal(there[0, : sum(map(len, rows))], np.concatenate(rows))
    assert not np.asarray(there)[0, sum(map(len, rows)) :].any()
    np.testing.assert_array_equal(again, parts)


def test_there_is_room_at_every_level(clips, packed):
    """Clips with odd sides: their rooms at half of the resolution fill a quarter of the pack at most."""
    config, rng = PackingConfig(multiple=(4, 2)), np.random.default_rng(0)
    grids = rng.integers(1, 12, (1000, 3))
    rooms = grids.prod(1) + config.margin(grids)
    assert (rooms >= grids.prod(1)).all() and (rooms % 8 == 0).all()
    t, h, w = grids.T
    assert (t * -(-h // 4) * -(-w // 2) * 8 == rooms).all()
    assert not PackingConfig().margin(grids).any()
    with pytest.raises(UserError, match=r"packing.length is 12; .* the room of 48 tokens"):
        packed([clips[:1]], 12, multiple=(4, 4))
