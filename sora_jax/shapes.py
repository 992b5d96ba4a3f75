"""Define the suffixes of names that give the shapes of arrays, for the whole package.

An array named `tokens_BLP` has shape (B, L, P):

=====  ==========================================================================
B      packs in a batch (fixed-size clips in a batch, for the autoencoder)
L      packed length, tokens in a pack
S      clip slots in a pack; slot s holds the clip of segment s + 1, segment 0 is padding
R      noise-level rows in a pack: a token points at a row, a row at a slot
D      width of the transformer
N K    heads, head width
F      hidden width of an MLP
T H W  frames, height and width of a clip in pixels
t h w  frames, height and width of the latent grid or of the token grid
C      channels of the latent
P      values in a patch
M      text tokens in a pack
E      width of the text encoder
=====  ==========================================================================

The aliases below are for annotations. In tests those of `sora_jax.diffusion` are checked at every call (setup.cfg).
"""

from typing import Any

from jaxtyping import Array, Float, Int, UInt32

PyTree = Any  # nested dicts, lists, tuples and flax structs of arrays, or of what stands for arrays

TokensBLP = Float[Array, "B L P"]
SegmentsBL = Int[Array, "B L"]  # 0 = padding, s + 1 = the clip of slot s
RowsBL = Int[Array, "B L"]  # each token's noise-level row
IndexBL = Int[Array, "B L"]  # each token's index in its clip, from 0
WeightBL = Float[Array, "B L"]  # weight of each token in the loss
PerTokenBL1 = Float[Array, "B L 1"]  # one number a token, with the rank of TokensBLP
TimesBR = Float[Array, "B R"]  # noise level of each row, in [0, 1]
TimesKBR = Float[Array, "K B R"]  # K times of a solver's grid
ClipIdsBS = UInt32[Array, "B S"]
PerClipBS = Float[Array, "B S"]
