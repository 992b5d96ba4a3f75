"""The legend of shape suffixes, one for the whole package.

A name such as `tokens_BLP` says that the array has shape (B, L, P):

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

The aliases below are for annotations; in tests those of the diffusion room are checked at every call (setup.cfg).
"""

from jaxtyping import Array, Float, Int, UInt32

TokensBLP = Float[Array, "B L P"]
SegmentsBL = Int[Array, "B L"]
TimesBR = Float[Array, "B R"]
ClipIdsBS = UInt32[Array, "B S"]
