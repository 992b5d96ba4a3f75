"""Guarded processes: same results for any number of them, and an item that kills or stops one costs only itself."""

import os
import time

import pytest

from sora_jax.data.building.guard import AHEAD, Failure, guarded_map


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
    assert list(guarded_map(square, range(20), workers, 30)) == [n**2 for n in range(20)]


def test_a_crash_and_a_hang_cost_only_their_own_item():
    deeds = ["a", "exit", "b", "c", "abort", "sleep", "d", "e"]
    results = list(guarded_map(wicked, deeds, 2, 1.0))
    failures = {deeds[i]: result.reason for i, result in enumerate(results) if isinstance(result, Failure)}
    assert failures == {
        "exit": "crash: its process ended with exit code 3",
        "abort": "crash: its process ended with SIGABRT",
        "sleep": "hang: not read within 1 s",
    }
    assert [result for result in results if isinstance(result, str)] == ["a", "b", "c", "d", "e"]


def test_few_items_are_under_way():
    taken = []
    results = guarded_map(square, (taken.append(n) or n for n in range(1000)), 1, 30)
    for _ in range(3):
        next(results)
    assert len(taken) <= 3 + AHEAD
    results.close()


def slow_first(number: int) -> int:
    time.sleep(0.0 if number else 1.0)
    return number


def test_results_that_wait_for_a_slow_one_are_few():
    taken = []
    results = guarded_map(slow_first, (taken.append(n) or n for n in range(1000)), 2, 30)
    assert next(results) == 0 and len(taken) <= 2 * AHEAD
    results.close()


def test_a_slow_reader_is_no_hang():
    results = guarded_map(square, range(6), 1, 0.5)
    for n in range(6):
        assert next(results) == n**2
        time.sleep(0.6 if n < 2 else 0)


def test_what_the_task_raises_is_raised_here():
    with pytest.raises(ZeroDivisionError) as raised:
        list(guarded_map(raising, [2, 1, 0], 1, 30))
    assert "in raising" in "".join(raised.value.__notes__)


def test_no_items():
    assert list(guarded_map(square, [], 2, 30)) == []
