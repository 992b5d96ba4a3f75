"""Measure the loss of held-out clips, while a denoiser trains and after: always the same clips, levels and noise.

The noise levels of a clip are spread over the distribution of training times, one in each of `held_out.levels` equal
parts. So the mean estimates the loss of training without what training leaves out of clips (dropped captions, given
frames). No draw depends on the run's seed, the step, the mesh or the batch: runs on one cache are measured alike.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.data.feeding.tokenizer import NULL, UNKNOWN
from sora_jax.data.packing.packs import PackItem, grid_of, pack_batch
from sora_jax.data.packing.planning import plan
from sora_jax.data.shard_spec import ShardSpec
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.storing.manifest import evenly_spread
from sora_jax.diffusion.keys import Purpose, clip_uniforms, step_key, token_noise
from sora_jax.diffusion.loss import Corruption, LossSpec, loss_weight, token_losses
from sora_jax.diffusion.process import process_named
from sora_jax.diffusion.times import time_quantiles
from sora_jax.models.pretrained import PretrainedText
from sora_jax.nn.pack import Pack, per_slot, slot_of
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import place_batch
from sora_jax.parallel.rules import parts
from sora_jax.train.denoiser import NOISE_BINS, DenoiserRun, Text, network
from sora_jax.train.low_resolution import with_low_noise
from sora_jax.train.state import MODEL

SEED = 0  # of times and noise
GROUPS = 8  # sizes, and lengths, at most that are reported by themselves


class ClipLosses(NamedTuple):
    """Hold sums over the tokens of each clip: the loss, its weight, and the noise level of the clip."""

    loss: jax.Array
    weight: jax.Array
    time: jax.Array


class HeldOutClips:
    """Choose the clips of a latent cache that are measured, at most `config.held_out.clips`, evenly spread; pack them.

    Clips that training could not take are left out: those over the size of a pack, or of an unknown class. split: the
    one that is measured; None: all but the one that is trained on. indices: the clips in the cache. available: how many
    there are to choose from.
    """

    def __init__(
        self,
        config: DenoiserRun,
        cache: LatentCache,
        text: Text,
        share: ShardSpec = ShardSpec(),
        split: str | None = None,
    ):
        self._config, self._cache, self._share = config, cache, share
        candidates = self._candidates(split)
        chosen = evenly_spread(candidates, config.held_out.clips)
        captions = cache.column("captions").take(np.array(chosen, np.int64)).to_pylist()
        items = [self._item(index, (texts or [""])[0], text) for index, texts in zip(chosen, captions, strict=True)]
        kept = [i for i, item in enumerate(items) if len(item.text) <= config.packs.text_length]
        self.indices, self._items = [chosen[i] for i in kept], [items[i] for i in kept]
        self.available = len(candidates)

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self) -> list["HeldOutBatch"]:
        """Plan batches of packs; rows that fill up the last one are copies. Their arrays are made when asked for."""
        mesh, packing = jax.sharding.get_mesh(), self._config.packs
        grids = np.array([grid_of(item.size, self._config.model.patch) for item in self._items])
        lengths = grids.prod(1) + packing.margin(grids)
        planned = plan(0, 0, lengths, np.array([len(item.text) for item in self._items]), packing)
        rows = [planned[row] for row in range(len(planned))]
        split = parts("batch", mesh)
        batch = min(self._config.batch // self._config.loop.accumulate, -(-len(rows) // split) * split)
        starts = range(0, len(rows), batch)
        filled = [rows[start : start + batch] for start in starts]
        return [HeldOutBatch(self, [*some, *some[-1:] * (batch - len(some))]) for some in filled]

    def place(self, rows: Sequence[np.ndarray]) -> Pack:
        """Pack the clips of some rows and place them on the mesh; each process its share."""
        own = [[self._items[i] for i in rows[row]] for row in self._share.rows(len(rows))]
        return Pack(**place_batch(pack_batch(own, self._config.packs), jax.sharding.get_mesh()))

    def groups(self) -> dict[str, dict[str, np.ndarray]]:
        """Return which clips (n,) bool have a size, "by_size", and a number of frames, "by_frames": the commonest."""
        frames, height, width = (self._cache.kept(side)[self.indices] for side in ("frames", "height", "width"))
        sizes = [f"{h}x{w}" for h, w in zip(height.tolist(), width.tolist(), strict=True)]
        keys = {"by_size": sizes, "by_frames": list(map(str, frames.tolist()))}
        return {
            name: {key: np.array(each) == key for key, _ in sorted(Counter(each).most_common(GROUPS), key=_number)}
            for name, each in keys.items()
        }

    def _candidates(self, split: str | None) -> list[int]:
        config, cache = self._config, self._cache
        grids, rest = np.divmod(cache.grids, np.array(config.model.patch))
        room = grids.prod(1) + config.packs.margin(grids)
        fits = (rest == 0).all(1) & (grids > 0).all(1) & (room <= config.packs.length)
        known = cache.labels < max(config.model.classes, 1)
        splits = np.array(cache.column("split").to_pylist())
        measured = splits != config.split if split is None else splits == split
        return np.flatnonzero(fits & known & measured).tolist()

    def _item(self, index: int, caption: str, text: Text) -> PackItem:
        embedding = None
        if isinstance(text, PretrainedText):  # the cache has what the encoder makes of a caption
            embedding = self._cache.text(index, 0)
            ids = np.full(len(embedding), UNKNOWN if caption.strip() else NULL, np.int32)
        else:
            ids = text.encode(caption)
        label, clip_id = int(self._cache.labels[index]), int(self._cache.clip_ids[index])
        low = self._cache.low(index) if self._config.packs.low else None
        return PackItem(self._cache[index], clip_id, ids, embedding, label, low=low)


class HeldOutBatch(NamedTuple):
    """Hold a batch of packs: the clips of each row, by their place among those that are measured."""

    clips: HeldOutClips
    rows: list[np.ndarray]

    def place(self) -> Pack:
        """Place the packs on the mesh."""
        return self.clips.place(self.rows)

    def scatter(self, values_BS: np.ndarray, into_n: np.ndarray) -> None:
        """Write the values of the slots to the places of their clips."""
        for values, members in zip(values_BS, self.rows, strict=True):
            into_n[members] = values[: len(members)]


class HeldOut:
    """Measure the loss of held-out clips, at `config.held_out.levels` noise levels each.

    Calling it with averages by group returns the metrics; all processes do.
    """

    def __init__(self, config: DenoiserRun, clips: HeldOutClips):
        self.clips, self._levels = clips, config.held_out.levels
        self._losses = jax.jit(functools.partial(clip_losses, config))

    def __bool__(self) -> bool:
        return len(self.clips) > 0

    def __call__(self, averages: dict) -> dict:
        """Return the metrics: the loss, and the loss by noise level, by size and by number of frames."""
        found = self.losses(averages)
        metrics = {"held_out/loss": mean_loss(found), "held_out/by_noise": loss_by_noise(found)}
        for name, groups in self.clips.groups().items():
            metrics |= {f"held_out/{name}/{key}": mean_loss(found, own_n[:, None]) for key, own_n in groups.items()}
        return metrics

    def losses(self, averages: dict, batches: Iterable[HeldOutBatch] | None = None) -> ClipLosses:
        """Return what was measured of each clip at each noise level, (clips, levels).

        batches: those of `clips.batches()`, for a caller that counts them.
        """
        sums = np.zeros((3, len(self.clips), self._levels))
        for batch in self.clips.batches() if batches is None else batches:
            pack = batch.place()
            for level in range(self._levels):
                found = distributed.on_host(self._losses(averages, pack, np.int32(level)))
                for values_BS, into in zip(found, sums, strict=True):
                    batch.scatter(values_BS, into[:, level])
        return ClipLosses(*sums)


def loss_by_noise(found: ClipLosses, chosen: np.ndarray | bool = True) -> np.ndarray:
    """Return the mean loss of a token in each of NOISE_BINS equal parts of [0, 1], NaN where there is none."""
    bins = np.minimum((np.asarray(found.time) * NOISE_BINS).astype(int), NOISE_BINS - 1)
    return np.array([mean_loss(found, chosen & (bins == i)) for i in range(NOISE_BINS)])


def mean_loss(found: ClipLosses, chosen: np.ndarray | bool = True) -> float:
    """Return the mean loss of a token, of all clips or the chosen (clips, levels); NaN where nothing is chosen."""
    weight = np.sum(found.weight, where=chosen)
    return float(np.sum(found.loss, where=chosen) / weight) if weight else float("nan")


def _number(entry: tuple[str, int]) -> tuple:
    """Order "16x24" and "9" by their numbers."""
    return tuple(map(int, entry[0].split("x")))


def clip_losses(config: DenoiserRun, params: dict, pack: Pack, level: jax.Array) -> ClipLosses:
    """Sum the denoising loss over the tokens of each clip at one of the noise levels, (B, S) each.

    Time and noise of a clip are functions of (level, clip id); the time is in part `level` of the distribution.
    """
    diffusion, levels = config.diffusion, config.held_out.levels
    process = process_named(diffusion.process)
    assert pack.tokens_BLP is not None
    uniform_BS = clip_uniforms(step_key(SEED, level, Purpose.HELD_OUT_TIME), pack.clip_ids_BS)
    times_BS = time_quantiles(diffusion.times, process, (level + uniform_BS) / levels, pack.grids_BS3.prod(-1))
    times_BR = per_slot(times_BS, pack.row_slots_BR)
    weight_BL = loss_weight(pack.segments_BL, times_BR, pack.rows_BL)
    ids_BL = per_slot(pack.clip_ids_BS, slot_of(pack.segments_BL))
    noise_key = step_key(SEED, level, Purpose.HELD_OUT_NOISE)
    eps_BLP = token_noise(noise_key, ids_BL, pack.index_BL, pack.tokens_BLP.shape[-1])
    low_times_BS = jnp.full_like(times_BS, diffusion.low_noise / 2)
    read = with_low_noise(process, pack, step_key(SEED, level, Purpose.LOW_NOISE), low_times_BS)
    spec = LossSpec(process, diffusion.prediction, diffusion.weight, config.model.learned_variance, NOISE_BINS)
    data = Corruption(pack.tokens_BLP.astype(jnp.float32), eps_BLP, times_BR, pack.rows_BL)
    mse_BL, vlb_BL, _ = token_losses(spec, network(params[MODEL], config, read), data, weight_BL)
    own_BLS = pack.segments_BL[:, :, None] == jnp.arange(1, pack.slots + 1)[None, None, :]
    loss_BS, weight_BS = (
        jnp.sum(jnp.where(own_BLS, x_BL[:, :, None], 0.0), axis=1) for x_BL in (mse_BL + vlb_BL, weight_BL)
    )
    return ClipLosses(loss_BS, weight_BS, times_BS)
