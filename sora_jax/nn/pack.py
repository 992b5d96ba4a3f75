"""Hold a batch of packs on the device: arrays of fixed shape with several clips of any size."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from sora_jax.data.feeding.tokenizer import NULL


@struct.dataclass
class Pack:
    """Hold the arrays of a batch of packs, under the names that `data.packing` gives them.

    tokens_BLP        clean latent patches; None if a sampler generates them
    segments_BL       clip slot + 1 of each token, 0 = padding
    coords_BL3        real (t, y, x) coordinates of each token inside its clip
    index_BL          index of each token inside its clip, raster order
    rows_BL           row of the conditioning table that each token reads
    row_slots_BR      clip slot that each row belongs to
    clip_ids_BS       identity of each clip, which keys its draws, 0 = empty slot; copies of a clip have different ones
    labels_BS         class of each clip + 1, 0 = none
    grids_BS3         token grid (t, h, w) of each clip, 0 = empty slot
    text_BM           text token ids
    text_segments_BM  clip slot + 1 of each text token, 0 = padding
    text_positions_BM position of each text token inside its caption
    embeddings_BME    embedding of each text token by a pretrained encoder; with it, text_BM only marks the null caption
    guides_BL         0 for tokens of clips, else the kind of the guide that a token is of, see `data.guides`; None
                      for a model without guides
    low_BLQ           patches of the clip at half its rows and columns, what lies under each token: Q = P / 4; None for
                      a model that does not read it
    low_times_BS      noise level of `low_BLQ` of each clip, see `train.low_resolution`; None: it is clean
    ranks_BS          rank of each clip among those of the batch, in [0, 1), for stratified times
    """

    segments_BL: jax.Array
    coords_BL3: jax.Array
    index_BL: jax.Array
    rows_BL: jax.Array
    row_slots_BR: jax.Array
    clip_ids_BS: jax.Array
    labels_BS: jax.Array
    grids_BS3: jax.Array
    text_BM: jax.Array
    text_segments_BM: jax.Array
    text_positions_BM: jax.Array
    tokens_BLP: jax.Array | None = None
    embeddings_BME: jax.Array | None = None
    guides_BL: jax.Array | None = None
    low_BLQ: jax.Array | None = None
    low_times_BS: jax.Array | None = None
    ranks_BS: jax.Array | None = None

    @property
    def slots(self) -> int:
        """Return S, the number of clip slots of a pack."""
        return self.clip_ids_BS.shape[-1]


def slot_of(segments: jax.Array) -> jax.Array:
    """Return the clip slot of each token; padding gets slot 0, whose values it never uses."""
    return jnp.maximum(segments - 1, 0)


def per_slot(values_BS: jax.Array, slots: jax.Array) -> jax.Array:
    """Gather for each token or row the value of its own clip: (B, S, ...), (B, X) -> (B, X, ...)."""
    return jax.vmap(lambda values, index: values[index])(values_BS, slots)


def drop_captions(pack: Pack, drop_BS: jax.Array) -> Pack:
    """Replace the captions of the clips marked in `drop_BS` by the null caption, and their classes by none.

    A dropped caption is the null token repeated at position 0. Attention over equal tokens equals attention over one of
    them, so this is the caption "" whatever the length of the dropped one.
    """
    dropped_BM = per_slot(drop_BS, slot_of(pack.text_segments_BM)) & (pack.text_segments_BM > 0)
    return dataclasses.replace(
        pack,
        labels_BS=jnp.where(drop_BS, 0, pack.labels_BS),
        text_BM=jnp.where(dropped_BM, NULL, pack.text_BM),
        text_positions_BM=jnp.where(dropped_BM, 0, pack.text_positions_BM),
    )
