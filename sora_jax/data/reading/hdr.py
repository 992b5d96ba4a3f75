"""Colours for ordinary screens: HDR (BT.2020 coded by PQ or HLG) and wide gamuts (BT.2020, P3) become sRGB."""

from functools import cache

import numpy as np

PQ, HLG = 16, 18  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
WHITE = 203.0  # cd/m2 of a white sheet of paper (ITU-R BT.2408)
STEPS = 4096  # of the tables
KNEE = 0.5  # of white: what is darker stays as it is, what is brighter is compressed

# Linear BT.2020 (ITU-R BT.2087) and P3 to linear BT.709; each row sums to 1, so that grey stays grey.
BT2020 = np.array([[1.6605, -0.5876, -0.0729], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1188]], np.float32)
P3 = np.array([[1.2249, -0.2249, 0], [-0.0421, 1.0421, 0], [-0.0196, -0.0786, 1.0982]], np.float32)
PRIMARIES = {9: BT2020, 11: P3, 12: P3}  # by AVCOL_PRI_*


def to_srgb(pixels: np.ndarray, transfer: int, primaries: int = 9) -> np.ndarray:
    """Bring pixels uint16 (H, W, 3), coded by `transfer` (PQ, HLG; any other is that of sRGB), to sRGB uint8.

    HDR is tone-mapped by its strongest channel, so hues stay; what lies outside of sRGB's colours is clipped.
    """
    light = _table(transfer)[pixels >> 4]
    if transfer == HLG:  # what a screen of 1000 cd/m2 makes of the light of the scene
        luma = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (1000 / WHITE * luma**0.2)[:, :, None]
    light = np.maximum(light @ PRIMARIES.get(primaries, BT2020).T, 0)
    if transfer in (PQ, HLG):
        peak = np.maximum(np.maximum(light[:, :, 0], light[:, :, 1]), light[:, :, 2])
        over = np.maximum(peak - KNEE, 0) / (1 - KNEE)
        mapped = np.where(peak < KNEE, peak, KNEE + (1 - KNEE) * (1 - np.exp(-over)))
        light *= (mapped / np.maximum(peak, 1e-6))[:, :, None]
    return _srgb_table()[(np.sqrt(np.minimum(light, 1)) * (STEPS - 1) + 0.5).astype(np.uint16)]


@cache
def _table(transfer: int) -> np.ndarray:
    """Return light for each code of 12 bits: on the screen (SMPTE ST 2084, 1 = WHITE; sRGB), in the scene for HLG."""
    code = np.arange(STEPS) / (STEPS - 1)
    if transfer == PQ:
        power = code ** (4096 / 2523 / 128)
        part = np.maximum(power - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * power)
        light = 10000 / WHITE * part ** (16384 / 2610)
    elif transfer == HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12)
    else:
        light = np.where(code <= 0.04045, code / 12.92, ((code + 0.055) / 1.055) ** 2.4)
    return light.astype(np.float32)


@cache
def _srgb_table() -> np.ndarray:
    """Return the sRGB code for each step of the square root of light."""
    light = (np.arange(STEPS) / (STEPS - 1)) ** 2
    coded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * coded + 0.5).astype(np.uint8)
