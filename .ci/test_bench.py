"""Run each benchmark of experiments/bench in its smallest form; what a benchmark compares computes the same loss.

    .venv/bin/pytest -n 0 .ci/test_bench.py

`.ci/run` does so; the suite does not, since no property of the package depends on it. No test looks at a time.
tests/test_damage.py runs the judge of `corrupt.py`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sora_jax.data.viewing.write import write_video

ROOT = Path(__file__).parents[1]
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run(script: str, *arguments: str) -> str:
    environment = os.environ | {"XLA_FLAGS": FAST_COMPILE, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, f"experiments/bench/{script}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_quick(script: str) -> str:
    return run(script, "--quick")


def losses(text: str) -> list[list[float]]:
    """Return the two losses of every line that compares two."""
    lines = [line for line in text.splitlines() if ": loss of " in line]
    return [[float(number) for number in re.findall(r"\d+\.\d+", line)] for line in lines]


@pytest.mark.parametrize("script, comparisons", [("packed_versus_padded.py", 1), ("step_versus_by_hand.py", 2)])
def test_a_benchmark_runs_and_its_sides_have_the_same_loss(script, comparisons):
    text = run_quick(script)
    found = losses(text)
    assert len(found) == comparisons
    for first, second in found:
        assert first > 0.1
        assert first == pytest.approx(second, rel=1e-4)
    assert f"`python experiments/bench/{script} --quick`" in text  # the table names its command


@pytest.mark.parametrize("script, comparisons", [("dit_versus_torch.py", 2), ("mixed_sizes_versus_torch.py", 1)])
def test_a_comparison_with_pytorch_has_the_same_loss_on_both_sides(script, comparisons):
    pytest.importorskip("diffusers")
    pytest.importorskip("torch")
    found = losses(run_quick(script))
    assert len(found) == comparisons
    for ours, theirs in found:
        assert ours > 0.1
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_compile_times_are_measured():
    rows = re.findall(r"^\| (\d) blocks \| \1 \| ([\d.]+) \| ([\d.]+) \|", run_quick("compile_time.py"), re.MULTILINE)
    assert [row[0] for row in rows] == ["2", "4"] and all(float(row[2]) > 0 for row in rows)


def test_attention_is_measured():
    text = run_quick("attention.py")
    assert len(re.findall(r"^\| 1 x \d+ \|.*\*\*[\d.]+\*\*", text, re.MULTILINE)) == 3
    (_, half), (dense, blocks) = re.findall(r"^\| (?:256|512) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
    assert int(half) < int(blocks) <= 2.5 * int(half) and int(blocks) < int(dense)


def test_the_installation_is_measured():
    text = run_quick("install.py")
    assert re.search(r"site-packages \| \d+ MiB", text)
    assert "jax, flax, av, matplotlib imported by it | 0 of 4" in text  # `import sora_jax` stays cheap


def test_the_feed_is_measured_against_the_bare_records():
    text = run_quick("feed.py")
    rates = re.findall(r"^\| (small|large) \| (.*?) \| (\d+) \|", text, re.MULTILINE)
    assert len(rates) == 8 and all(int(packs) > 0 for _, _, packs in rates)
    fills = [float(value) for value in re.findall(r"(\d+\.\d+)% \|$", text, re.MULTILINE)]
    assert len(fills) == 5 and all(97 < fill <= 100 for fill in fills)  # 5,000 clips: the last packs are short
    assert "step 500 of 600 clips" in text


def test_every_way_of_recomputing_has_the_same_loss():
    found = re.findall(r"^(\S+): loss of the first step (\d+\.\d+)$", run_quick("remat.py"), re.MULTILINE)
    values = [float(value) for _, value in found]
    assert "full" in dict(found) and len(values) > 1
    assert values == pytest.approx([values[0]] * len(values), rel=1e-5) and values[0] > 0.1


def test_reading_a_folder_is_measured_against_a_bare_loop(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (6, 48, 64, 3), dtype=np.uint8)
    for number in range(2):
        write_video(tmp_path / f"{number}.mp4", frames, 8)
    text = run("decode.py", str(tmp_path), "--rounds=1", "--processes=1")
    assert re.search(r"^\| .* \| 2 \| 12 \|", text, re.MULTILINE)


def test_a_long_file_is_measured():
    text = run("long_file.py", "--minutes=0.4", "--spans=2")
    assert re.search(r"^\| hour\.mp4, \d+ MB \| 2 \|", text, re.MULTILINE)
