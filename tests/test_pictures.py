"""Pictures: upright, whole, in sRGB, over white; what stands beside the pixels costs no picture, damage does."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pillow_heif
import pytest
from fixtures_media import COLOURS, corners, flat, names, noise, quadrants
from PIL import Image, ImageCms

from sora_jax.data.reading.media import DecodedClip, SpanRule, decode
from sora_jax.data.reading.tracks import MediaError

DATA = Path(__file__).parent / "data" / "pictures"
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SWAPPED = SRGB.replace(b"rXYZ", b"temp").replace(b"gXYZ", b"rXYZ").replace(b"temp", b"gXYZ")  # red is green
CURVE = SRGB.index(b"para")
MAC = SRGB[: CURVE + 8] + struct.pack(">HHI", 0, 0, round(1.8 * 65536)) + SRGB[CURVE + 16 :]  # gamma 1.8
# The eight values of EXIF's orientation: what brings the stored picture upright.
UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: np.rot90}  # fmt: skip


def coded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    image, buffer = image if isinstance(image, Image.Image) else Image.fromarray(image), io.BytesIO()
    if kind == "HEIF":
        pillow_heif.from_pillow(image).save(buffer, quality=95, **options)
    else:
        image.save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes) -> DecodedClip:
    return decode(io.BytesIO(data))


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def near(frame: np.ndarray, colours, tolerance: int = 4) -> bool:
    """Return True if the middles of the quarters, row by row, have these colours."""
    h, w = frame.shape[0] // 4, frame.shape[1] // 4
    return bool(np.abs(frame[[h, h, 3 * h, 3 * h], [w, 3 * w, w, 3 * w]].astype(int) - colours).max() <= tolerance)


@pytest.mark.parametrize("name", ["grid.heic", "p3.png", "adobe.jpg"])
def test_known_colours(name):
    """A HEIC of 2 x 2 tiles; pictures in Display P3 and in Adobe RGB."""
    clip = decode(DATA / name)
    assert near(clip.frames[0], [(220, 30, 30), (30, 200, 30), (30, 30, 220), (220, 220, 30)], 5)
    assert clip.frames.shape == (1, *((128, 128) if name == "grid.heic" else (96, 128)), 3) and not clip.flags


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_turned_and_mirrored(kind):
    for value, upright in UPRIGHT.items():
        exif = orientation(value)
        frame = read(coded(quadrants(), kind, exif=exif if kind == "TIFF" else exif.tobytes())).frames[0]
        assert frame.shape == upright(quadrants()).shape
        assert corners(frame) == corners(upright(quadrants()))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_profiles(kind):
    swapped = COLOURS[[0, 1, 3, 2]][:, [1, 0, 2]]
    assert near(read(coded(quadrants(), kind, icc_profile=SWAPPED)).frames[0], swapped, 6)
    plain = read(coded(quadrants(), kind)).frames
    near_srgb = SRGB[: CURVE + 12] + struct.pack(">I", round(2.44 * 65536)) + SRGB[CURVE + 16 :]
    for profile in (near_srgb, SWAPPED[:300], SWAPPED[:128] + bytes(400)):  # sRGB, nearly, and broken ones
        np.testing.assert_array_equal(read(coded(quadrants(), kind, icc_profile=profile)).frames, plain)


def test_profiles_of_other_modes():
    ramp = np.arange(0, 256, 5, dtype=np.uint8)[None].repeat(4, 0)
    light = (ramp / 255) ** 1.8
    expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    grey = MAC.replace(b"RGB ", b"GRAY", 1).replace(b"rTRC", b"kTRC")
    for mode, profile in (("L", grey), ("RGB", MAC), ("P", MAC), ("LA", grey), ("P", grey), ("L with a key", grey)):
        key = dict(transparency=1) if "key" in mode else {}  # a level that no pixel has
        frame = read(coded(Image.fromarray(ramp).convert(mode.split()[0]), icc_profile=profile, **key)).frames[0]
        assert np.abs(frame - expected[:, :, None]).max() < 1.5, mode
    half = np.dstack([ramp, ramp, ramp, np.full_like(ramp, 127)])
    mixed = 127 / 255 * expected + 128
    assert np.abs(read(coded(half, icc_profile=MAC)).frames[0] - mixed[:, :, None]).max() < 1.5
    cmyk = Image.fromarray(quadrants()).convert("CMYK")  # with a profile of RGB, which cannot be its own
    assert corners(read(coded(cmyk, "JPEG", quality=95, icc_profile=SWAPPED)).frames[0]) == [0, 1, 2, 3]


def test_broken_exif_costs_no_picture():
    turn = struct.pack("<HHII", 0x0112, 3, 1, 6)
    whole = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + turn + struct.pack("<HHII", 0x010F, 2, 99999, 99999)
    for exif in (whole[:-4], whole[:12], whole[:14] + b"\xff\xff" + whole[16:], b"Exif\0\0garbage", whole):
        frame = read(coded(quadrants(), "JPEG", quality=95, exif=exif)).frames[0]
        turned = np.rot90(quadrants(), -1) if turn in exif else quadrants()
        assert corners(frame) == corners(turned), exif


def test_broken_exif_is_not_printed(tmp_path):
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 2, 0x0112, 3, 1, 6)
    (tmp_path / "a.jpg").write_bytes(coded(quadrants(), "JPEG", exif=exif))
    code = "import sys; from sora_jax.data.reading.media import decode; decode(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "a.jpg"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.parametrize("tag", [{254: 1}, {50706: b"\1\4\0\0"}])
def test_a_preview_is_not_taken_for_a_raw_photo(tag):
    """NewSubfileType with bit 0, DNGVersion (Adobe DNG specification, 1.4)."""
    with pytest.raises(MediaError, match="^unreadable: a raw photo"):
        read(coded(quadrants(), "TIFF", tiffinfo=tag))


@pytest.mark.parametrize("kind", ["HEIF", "AVIF"])
@pytest.mark.parametrize("light", [0.05, 0.25, 0.45])
def test_hdr_pictures(light, kind):
    """Grey of a share of the light of paper white (203 cd/m2), in PQ by SMPTE ST 2084, is that of sRGB."""
    power = (light * 203 / 10000) ** (2610 / 16384)
    code = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    pixels, buffer = np.full((64, 64, 3), round(65535 * code), np.uint16), io.BytesIO()
    if kind == "HEIF":
        profile = dict(color_primaries=9, transfer_characteristics=16, matrix_coefficients=9)
        pillow_heif.encode("RGB;16", (64, 64), pixels.tobytes(), buffer, quality=95, **profile)
    else:
        with av.open(buffer, "w", format="avif") as container:
            stream = container.add_stream("libsvtav1", rate=1, options={"crf": "5", "preset": "8"})
            stream.height, stream.width, stream.pix_fmt, context = 64, 64, "yuv420p10le", stream.codec_context
            context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, 16, 9, 1
            planes = np.full((96, 64), 512, np.uint16)
            planes[:64] = round(64 + 876 * code)
            container.mux([*stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p10le")), *stream.encode()])
    assert read(buffer.getvalue()).fps == 1
    assert np.abs(read(buffer.getvalue()).frames - 255 * (1.055 * light ** (1 / 2.4) - 0.055)).max() < 3


def test_pictures_that_are_left_out_are_flagged():
    heic, buffer = pillow_heif.from_pillow(Image.fromarray(quadrants())), io.BytesIO()
    heic.add_from_pillow(Image.fromarray(flat(1)[0]))
    heic.save(buffer, primary_index=0)
    pages = coded(quadrants(), "TIFF", save_all=True, append_images=[Image.fromarray(flat(1)[0])])
    for data in (buffer.getvalue(), pages):
        clip = read(data)
        assert corners(clip.frames[0]) == [0, 1, 2, 3]
        assert clip.flags == ("several: picture 1 of 2, the others are left out",)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "AVIF", "GIF"])
def test_delays_are_those_of_browsers(kind):
    first, *rest = [Image.fromarray(frame) for frame in flat(9)]
    options = dict(save_all=True, append_images=rest) | (dict(lossless=True) if kind == "WEBP" else {})
    for delay, rate in ((10, 10), (20, 50), (120, 8.333), (600_000, 0.00166667)):
        data = coded(first, kind, duration=delay, **options)
        assert (read(data).fps, names(read(data).frames)) == (rate, names(flat(9)))
        if delay == 10:
            assert names(decode(io.BytesIO(data), SpanRule(fps=8)).frames) == [0, 1, 2, 4, 5, 0, 1]


@pytest.mark.parametrize(("kind", "start", "share"), [("PNG", b"IDAT", 0), ("JPEG", b"\xff\xda", 0.4)])
def test_bytes_that_are_changed(kind, start, share):
    """Pillow alone gives other pictures for some of them; at most this share of those may pass."""
    data, alone, passed = coded(quadrants(), kind), 0, 0
    for place in range(data.index(start) + 14, len(data) - 16):
        changed = data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]
        try:
            other = Image.open(io.BytesIO(changed)).convert("RGB")
            alone += (wrong := np.abs(np.asarray(other).astype(int) - quadrants()).mean() > 2)
            passed += wrong and bool(read(changed))
        except Exception:
            continue
    assert alone >= 5 and passed <= share * alone


def test_damage():
    pictures = noise(6, 64, 64)
    heic, grid = coded(pictures[0], "HEIF"), (DATA / "grid.heic").read_bytes()
    middle, avif = len(heic) // 2, coded(quadrants(), "AVIF")
    meta = avif.index(b"meta") + 4
    for data in (
        heic[:middle] + bytes(100) + heic[middle + 100 :],
        avif[:meta] + b"x" + avif[meta + 1 :],  # not for libav, which would find the first tile of a grid
        *(data[: len(data) * part // 8] for data in (coded(pictures[0]), heic, grid) for part in range(2, 8)),
    ):
        with pytest.raises(MediaError, match="^(damaged|unreadable): "):
            read(data)
    first, *rest = [Image.fromarray(frame) for frame in pictures]
    animation = coded(first, save_all=True, append_images=rest, duration=100)
    clip = read(animation[: len(animation) * 5 // 8])
    np.testing.assert_array_equal(clip.frames, pictures[: len(clip.frames)])
    assert 2 <= len(clip.frames) <= 4 and clip.flags[0].startswith("partial: damaged: ")
