"""Guarded processes: same results for any number of them, and an item that kills or stops one costs only itself."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from sora_jax.data.building.pool import AHEAD, Refusal, map_with_timeout


def square(number: int) -> int:
    time.sleep(0.01 * (number % 3))  # so that answers come out of order
    return number**2


def wicked(deed: str) -> str:
    deeds = {"exit": lambda: os._exit(3), "abort": os.abort, "sleep": lambda: time.sleep(60)}
    deeds.get(deed, str)()
    return deed


def raising(number: int) -> int:
    return 1 // number


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_results_are_in_order_for_any_number_of_workers(workers):
    assert list(map_with_timeout(square, range(20), workers, 30)) == [n**2 for n in range(20)]
    assert list(map_with_timeout(square, [], workers, 30)) == []


def test_a_crash_and_a_hang_cost_only_their_own_item():
    deeds = ["a", "exit", "b", "c", "abort", "sleep", "d", "e"]
    results = list(map_with_timeout(wicked, deeds, 2, 1.0))
    failures = {deeds[i]: result.reason for i, result in enumerate(results) if isinstance(result, Refusal)}
    assert failures == {
        "exit": "crash: its process ended with exit code 3",
        "abort": "crash: its process ended with SIGABRT",
        "sleep": "hang: not read within 1 s",
    }
    assert [result for result in results if isinstance(result, str)] == ["a", "b", "c", "d", "e"]


class Deadly:
    """A result that kills the process which pickles it, as the kernel does when memory is short."""

    def __reduce__(self):
        os.kill(os.getpid(), signal.SIGKILL)


def deadly(number: int):
    return Deadly() if number == 1 else number


@pytest.mark.parametrize("workers", [1, 2])
def test_a_process_that_is_killed_while_it_answers_stops_no_other(workers):
    killed = Refusal("crash: its process ended with SIGKILL")
    assert list(map_with_timeout(deadly, range(4), workers, 30)) == [0, killed, 2, 3]


def test_an_early_end_leaves_no_process():
    results = map_with_timeout(wicked, ["a", *["sleep"] * 9], 2, 30)
    assert next(results) == "a" and multiprocessing.active_children()
    results.close()
    assert multiprocessing.active_children() == []


def test_a_script_without_a_main_guard_is_told_what_it_needs(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from sora_jax.data.building.pool import *\nlist(map_with_timeout(abs, [1], 1, 9))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert "the main script needs if __name__ == '__main__'" in done.stderr.splitlines()[-1]


def slow_first(number: int) -> int:
    time.sleep(0.0 if number else 1.0)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_few_items_are_under_way_or_wait_for_a_slow_one(workers):
    taken = []
    results = map_with_timeout(slow_first, (taken.append(n) or n for n in range(1000)), workers, 30)
    assert [next(results) for _ in range(3)] == [0, 1, 2] and len(taken) <= 3 + workers * AHEAD
    results.close()


def test_a_slow_reader_is_no_hang():
    results = map_with_timeout(square, range(6), 1, 0.5)
    for n in range(6):
        assert next(results) == n**2
        time.sleep(0.6 if n < 2 else 0)


def refuse():
    raise FileNotFoundError("the source has changed")


class Changed:
    """A task that can be pickled, and not unpickled."""

    def __reduce__(self):
        return refuse, ()


def test_what_unpickling_the_task_raises_is_raised_here():
    with pytest.raises(FileNotFoundError, match="the source has changed"):
        list(map_with_timeout(Changed(), [1], 1, 30))


def test_what_the_task_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError) as raised:
        list(map_with_timeout(raising, [2, 1, 0], 1, 30))
    assert "in raising" in "".join(raised.value.__notes__)
