"""Spans of an hour-long file: memory of the process that reads them, and seconds a span.

python experiments/bench/long_file.py [--file=FILE] [--minutes=60] [--spans=20]

Without --file, one of 1920 x 1080 pixels at 30 frames a second is made: twenty seconds are encoded and repeated. The
spans are read in a process of its own that holds nothing else. Exit code 1 above --limit MiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sora_jax.data.fit import SizeRule
from sora_jax.data.reading.media import SpanRule, decode

RATE, SEGMENT = 30, 600  # frames a second, frames that are encoded
HEADER = ["file", "spans", "first span, s", "later spans, median s", "later spans, longest s", "peak memory, MiB"]


def make_file(path: Path, minutes: float, height: int = 1080, width: int = 1920) -> Path:
    """Write a film of drifting blocks: the packets of twenty seconds over and over, with later time stamps."""
    import av

    coarse = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8 + SEGMENT, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "30", "g": "120"}
        packets = []
        for k in range(SEGMENT):
            drifted = coarse[:, k : k + width // 8].repeat(8, 0).repeat(8, 1)
            packets += stream.encode(av.VideoFrame.from_ndarray(drifted, format="rgb24"))
        packets += stream.encode()
        unit = packets[0].time_base
        length = int(SEGMENT / RATE / unit)
        for repeat in range(round(minutes * 60 * RATE / SEGMENT)):
            for packet in packets:
                later = av.Packet(bytes(packet))
                later.stream, later.time_base, later.is_keyframe = stream, unit, packet.is_keyframe
                later.pts, later.dts = packet.pts + repeat * length, packet.dts + repeat * length
                container.mux(later)
    return path


def read_spans(path: str, spans: int) -> dict:
    """Return the seconds of each span and the process's peak memory in MiB."""
    seconds, starts = [], []
    for number in range(spans):
        begun = time.perf_counter()
        clip = decode(path, SpanRule(49, place=0.5, number=number, count=spans), SizeRule(16, 256 * 256))
        seconds.append(time.perf_counter() - begun)
        starts.append(clip.start)
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
    return {"seconds": seconds, "starts": starts, "peak": peak, "shape": clip.frames.shape}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", default="")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--spans", type=int, default=20)
    parser.add_argument("--limit", type=float, default=600)
    parser.add_argument("--read", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read_spans(options.file, options.spans)))
        return 0
    import timing

    with tempfile.TemporaryDirectory() as folder:
        path = options.file or str(make_file(Path(folder, "hour.mp4"), options.minutes))
        command = [sys.executable, __file__, "--read", f"--file={path}", f"--spans={options.spans}"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = Path(path).stat().st_size / 1e6
    first, *later = found["seconds"]
    later = later or [first]
    row = [f"{Path(path).name}, {size:.0f} MB", str(options.spans), f"{first:.2f}", f"{np.median(later):.2f}",
           f"{max(later):.2f}", f"{found['peak']:.0f}"]  # fmt: skip
    shape = "x".join(map(str, found["shape"]))
    notes = f"The first span pays for reading all time stamps; starts {found['starts'][0]:.0f} to "
    notes += f"{found['starts'][-1]:.0f} s, frames {shape}; at most {options.limit:g} MiB are allowed."
    print(timing.report(HEADER, [row], notes, timing.machine()))
    return int(found["peak"] > options.limit)


if __name__ == "__main__":
    sys.exit(main())
