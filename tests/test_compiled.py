"""Compiled programs that are kept: reused by the next process, never stale, within a bound."""

import json
import os
import subprocess
import sys

import pytest
from fixtures_runs import ROOT

from sora_jax.parallel.settings import trim

PROGRAM = """
import collections, json, sys
import jax, numpy as np
from jax._src import cache_key
from sora_jax.parallel.settings import use_compilation_cache

events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
cache_key.jaxlib_version_str += sys.argv[2]
use_compilation_cache()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
sys.path.insert(0, sys.argv[1])
from code_of_a_user import function
value = float(jax.jit(function)(np.float32(3)))
print(json.dumps([value, events["cache_hits"], events["cache_misses"]]))
"""


@pytest.fixture
def run(tmp_path):
    """Run code with a constant as a process of its own; return its value, and what was found and not found."""

    def run(constant: float, upgrade: str = "") -> list:
        (tmp_path / "code_of_a_user.py").write_text(f"def function(x):\n    return {constant} * x\n")
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SORA_JAX_CACHE": str(tmp_path / "cache")}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # two edits in a second would leave Python's own cache stale
        words = [sys.executable, "-c", PROGRAM, str(tmp_path), upgrade]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_the_next_process_compiles_nothing_and_no_program_is_stale(run):
    assert run(2.0) == [6.0, 0, 1]
    assert run(2.0) == [6.0, 1, 0]
    assert run(5.0) == [15.0, 0, 1]  # edited: another program
    assert run(5.0, upgrade=".1") == [15.0, 0, 1]  # another jaxlib: what the other one compiled is not for it


def test_the_programs_that_were_read_last_are_kept(tmp_path):
    for number, name in enumerate(("old", "new", "newest")):
        path = tmp_path / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 + number, 1000))
    (tmp_path / "of-another-program").write_bytes(bytes(1000))
    trim(tmp_path, 300)
    assert len(list(tmp_path.iterdir())) == 4
    trim(tmp_path, 250)
    assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "newest-cache", "of-another-program"}
