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

The aliases below are for annotations.
"""

from jaxtyping import Array, Bool, Float, Int, UInt32

TokensBLP = Float[Array, "B L P"]
HiddenBLD = Float[Array, "B L D"]
SegmentsBL = Int[Array, "B L"]
CoordsBL3 = Float[Array, "B L 3"]
TimesBR = Float[Array, "B R"]
ClipsBS = UInt32[Array, "B S"]
MaskBL = Bool[Array, "B L"]
VideoBTHWC = Float[Array, "B T H W C"]
LatentBthwC = Float[Array, "B t h w C"]
