"""High dynamic range: closed forms of the two codes, order and neutrality of what becomes of them."""

import numpy as np
import pytest

from sora_jax.data.reading.hdr import HLG, KNEE, PQ, WHITE, to_srgb


def pq(nits: np.ndarray) -> np.ndarray:
    """The PQ code in 16 bits of displayed light (SMPTE ST 2084, inverse EOTF)."""
    power = (np.asarray(nits) / 10000) ** 0.1593017578125
    return np.round(65535 * ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375).astype(np.uint16)


def srgb(light: np.ndarray) -> np.ndarray:
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def grey(codes) -> np.ndarray:
    return np.asarray(codes, np.uint16)[None, :, None].repeat(3, 2)


def test_dark_light_keeps_its_brightness():
    light = np.linspace(0.002, KNEE - 0.01, 50)
    read = to_srgb(grey(pq(WHITE * light)), PQ)[0]
    assert np.abs(read - srgb(light)[:, None]).max() <= 2


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_grey_stays_grey_and_brighter_stays_brighter(transfer):
    read = to_srgb(grey(np.linspace(0, 65535, 400)), transfer)[0].astype(int)
    assert np.ptp(read, axis=1).max() <= 1
    assert (np.diff(read[:, 1]) >= 0).all() and read[0, 0] == 0 and read[-1, 0] >= 254


def test_white_paper_is_as_bright_in_both_codes():
    # ITU-R BT.2408: 203 cd/m2 are 58 % of PQ and 75 % of HLG.
    papers = [to_srgb(grey([65535 * share]), transfer)[0, 0, 0] for share, transfer in ((0.58, PQ), (0.75, HLG))]
    assert abs(int(papers[0]) - int(papers[1])) <= 3 and 225 < papers[0] < 250


def test_primaries_of_a_colour_that_both_spaces_hold():
    # Linear BT.709 (0.3, 0.1, 0.1) in BT.2020, by the matrix of ITU-R BT.2087.
    matrix = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    read = to_srgb(pq(WHITE * matrix @ (0.3, 0.1, 0.1))[None, None], PQ)[0, 0]
    assert np.abs(read - srgb(np.array([0.3, 0.1, 0.1]))).max() <= 2
