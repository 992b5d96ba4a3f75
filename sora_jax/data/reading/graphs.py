"""Filter graphs of FFmpeg (`ffmpeg -vf`) that turn decoded frames into upright RGB pixels of the wanted size.

A graph does all but HDR and wide gamuts, which are in `hdr`: PyAV's FFmpeg is built without zscale and libplacebo;
`tonemap` needs the linear light that only they give, `scale` cuts off what is brighter than paper or, with
intent=perceptual, darkens every picture for a peak of 10,000 cd/m2, and `colorspace` takes no odd sizes.
"""

from typing import Any

import numpy as np
from av import VideoFrame
from av.filter import Graph
from av.sidedata.sidedata import SideDataContainer
from av.video.reformatter import ColorRange

from sora_jax.data.reading.hdr import HLG, PQ, PRIMARIES, to_srgb
from sora_jax.data.reading.tracks import Fit

# AVCOL_SPC_* to the names of `setparams`.
MATRICES = {1: "bt709", 4: "fcc", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc", 10: "bt2020nc"}
# Frames that the decoder marks as interlaced become progressive, the others pass; the number of frames stays.
TIME_BASE = "1/1000"  # of all graphs; ticks pass as they are
DEINTERLACE = ["bwdif=mode=send_frame:deint=interlaced", f"settb={TIME_BASE}"]  # bwdif halves the time base
# Codecs whose chroma samples stand on the even columns of luma, if they say no more. PyAV does not show what a frame
# says of it, and `scale` takes the middle between two columns unless it is told.
LEFT_CHROMA = {"h264", "hevc", "mpeg2video", "mpeg4", "vc1", "wmv3"}
# White minus premultiplied inverse: colour * alpha + white * (1 - alpha). Scaled before, a picture would show the
# colours of its transparent parts.
OVER_WHITE = ["format=gbrap", "negate", "premultiply=inplace=1", "format=gbrp", "negate"]
# From the display matrix [a b; c d] (x' = a x + c y, y' = b x + d y), as `ffmpeg -autorotate` does.
FLIPS = {(1, 1): [], (-1, 1): ["hflip"], (1, -1): ["vflip"], (-1, -1): ["hflip", "vflip"]}  # signs of a, d
TRANSPOSES = {(1, 1): "cclock_flip", (1, -1): "clock", (-1, 1): "cclock", (-1, -1): "clock_flip"}  # signs of b, c


def build_graph(filters: list[str], frame: VideoFrame) -> Graph:
    """Return a configured graph of one chain of filters for frames like this one."""
    graph = Graph()
    graph.threads = 1  # must be set before a filter is added
    size, kind = f"{frame.width}x{frame.height}", frame.format.name
    colours = {"colorspace": str(int(frame.colorspace)), "range": str(int(frame.color_range))}
    nodes = [graph.add("buffer", video_size=size, pix_fmt=kind, time_base=TIME_BASE, **colours)]
    for text in filters:
        name, _, options = text.partition("=")
        nodes.append(graph.add(name, options or None))
    graph.link_nodes(*nodes, graph.add("buffersink")).configure()
    return graph


class FrameRenderer:
    """Renders frames by graphs that it keeps, one for each kind of frame and size.

    pixel_aspect: width over height of a pixel. codec: canonical name of the stream's codec.
    """

    def __init__(self, pixel_aspect: float, codec: str):
        self.pixel_aspect = pixel_aspect
        self.matrix: np.ndarray | None = None  # the display matrix of frames that carry none, (9,)
        self.chroma = "left" if codec in LEFT_CHROMA else "center"
        self.graphs: dict[tuple, Graph] = {}

    def render(self, frame: VideoFrame, fit: Fit | None) -> np.ndarray:
        """Return the frame upright, in sRGB uint8 (H, W, 3), scaled to cover the size of `fit` and cropped evenly."""
        matrix = display_matrix(frame)
        kind = frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, is_mapped(frame)
        key = fit, kind, None if matrix is None else matrix.tobytes()
        if key not in self.graphs:
            self.graphs[key] = build_graph(self._filters(frame, self.matrix if matrix is None else matrix, fit), frame)
        self.graphs[key].push(frame)
        pixels = self.graphs[key].pull().to_ndarray()
        return to_srgb(pixels, frame.color_trc, frame.color_primaries) if is_mapped(frame) else pixels

    def _filters(self, frame: VideoFrame, matrix: np.ndarray | None, fit: Fit | None) -> list[str]:
        turn = turn_filters(matrix)
        order = -1 if turn and turn[0].startswith("transpose") else 1
        height, width = frame.height, max(1, round(frame.width * self.pixel_aspect))
        target = fit(*(height, width)[::order])[::order] if fit else (height, width)
        scale = max(target[0] / height, target[1] / width)
        # The size that covers the target, larger by an even number of pixels on each axis.
        rows, columns = (want + 2 * round((have * scale - want) / 2) for have, want in zip((height, width), target))
        filters = colour_filters(frame, f"{columns}:{rows}", self.chroma)
        if (rows, columns) != target:
            filters.append(f"crop={target[1]}:{target[0]}:{(columns - target[1]) // 2}:{(rows - target[0]) // 2}")
        return filters + turn


def display_matrix(frame: VideoFrame) -> np.ndarray | None:
    """Return the display matrix of a frame, (9,)."""
    try:
        # `frame.side_data` would be kept in a cycle with the frame, until Python collects its garbage.
        found: Any = SideDataContainer(frame).get("DISPLAYMATRIX")  # type: ignore[call-arg]
    except ValueError:  # PyAV lists no side data if one is of a type that it does not know
        angle = np.radians(frame.rotation)
        return np.array([np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1]) * 2**16
    return None if found is None else np.frombuffer(bytes(found), np.int32)


def turn_filters(matrix: np.ndarray | None) -> list[str]:
    """Return the filters that turn and mirror a stored frame upright, to the nearest quarter."""
    if matrix is None:
        return []
    a, b, c, d = (int(matrix[k]) for k in (0, 1, 3, 4))
    if abs(b) + abs(c) > abs(a) + abs(d):
        return [f"transpose={TRANSPOSES[1 if b > 0 else -1, 1 if c > 0 else -1]}"]
    return FLIPS[-1 if a < 0 else 1, -1 if d < 0 else 1]


def colour_filters(frame: VideoFrame, size: str, chroma: str) -> list[str]:
    """Return the filters that scale a frame and bring it to RGB, over white: of 8 bits; of 16 if `to_srgb` follows."""
    palette = frame.format.has_palette
    alpha = palette or any(component.is_alpha for component in frame.format.components)
    # Untagged, what players guess (mpv: BT.709 for high definition, BT.601 below).
    matrix = MATRICES.get(frame.colorspace, "bt709" if frame.width >= 1280 or frame.height > 576 else "smpte170m")
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    rgb = palette or frame.format.is_rgb
    parameters = [] if rgb else [f"setparams=colorspace={matrix}:range={'pc' if full else 'tv'}"]
    # swscale scales the planes before it mixes them; without these flags every second column takes the colour of two.
    flags = f"in_chroma_loc={chroma}:flags=bicubic+full_chroma_int+full_chroma_inp+accurate_rnd"
    white = [f"scale={flags}", *OVER_WHITE] if alpha else []
    return [*parameters, *white, f"scale={size}:{flags}", "format=gbrp16le" if is_mapped(frame) else "format=gbrp"]


def is_mapped(frame: VideoFrame) -> bool:
    """Return True for frames whose colours `to_srgb` has to map: coded by PQ or HLG, or of wide primaries."""
    return frame.color_trc in (PQ, HLG) or frame.color_primaries in PRIMARIES
