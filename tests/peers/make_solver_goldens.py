"""Trajectories of the schedulers of diffusers, for `tests/test_peers.py`.

pip install -e '.[test-peers,text]'
python tests/peers/make_solver_goldens.py            # writes tests/goldens/solvers.npz
python tests/peers/make_solver_goldens.py --check    # compares the file with the installed peer
"""

import argparse
import importlib
import sys
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from solver_cases import CASES, GOLDENS, Case, fixed_inputs, network

TOLERANCE = 1e-6


def trajectory(case: Case, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """States (steps + 1, 1, L, P) as the model sees them, and the times (steps,) at which it does."""
    scheduler = getattr(diffusers, case.scheduler)(**case.peer_arguments)
    flow = case.scheduler.startswith("FlowMatch")
    if flow and case.spacing == "even":
        sigmas = np.linspace(1.0, 1.0 / case.steps, case.steps)
        scheduler.set_timesteps(sigmas=sigmas, mu=_log_shift(scheduler.config, case.tokens))
    else:
        scheduler.set_timesteps(case.steps)
    draws = (_channels_first(draw) for draw in inputs["draws"])
    x = _channels_first(inputs["start"])
    # In sigma space the peer holds x / a.
    x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5 if case.scheduler.startswith("Euler") else x
    states, times = [], []
    module = importlib.import_module(type(scheduler).__module__)
    with mock.patch.object(module, "randn_tensor", lambda *_, **__: next(draws), create=True):
        for t in scheduler.timesteps:
            seen = x if flow else scheduler.scale_model_input(x, t)
            times.append(float(t) / 1000 if flow else (float(t) + 1) / 1000)
            states.append(_channels_last(seen))
            y = network(inputs, states[-1], np.float32(times[-1]), case.variance == "learned")
            options = {"eta": case.solver.eta} if case.scheduler == "DDIMScheduler" else {}
            x = scheduler.step(_channels_first(y), t, x, **options).prev_sample
    return np.stack([*states, _channels_last(x)]), np.array(times)


def make() -> dict[str, np.ndarray]:
    inputs = fixed_inputs()
    arrays = dict(inputs)
    for name, case in CASES.items():
        arrays[f"{name}/states"], arrays[f"{name}/times"] = trajectory(case, inputs)
    return arrays


def check(arrays: dict[str, np.ndarray]) -> bool:
    """Whether the file holds what the peer gives; prints the largest deviation of each case."""
    with np.load(GOLDENS) as stored:
        print(f"stored: diffusers {stored['version']}; installed: {diffusers.__version__}")
        names = set(stored.files) - {"version"}
        good = names == set(arrays)
        for name in sorted(names & set(arrays)):
            deviation = np.abs(stored[name] - arrays[name]).max() / np.abs(stored[name]).max()
            good &= bool(deviation <= TOLERANCE)
            print(f"{deviation:.1e}  {name}")
    for name in sorted(names ^ set(arrays)):
        print(f"missing  {name}")
    print("the same" if good else "DIFFERENT")
    return good


def _log_shift(options, tokens: int) -> float | None:
    """The logarithm of the shift by which the pipelines of FLUX sample so many tokens; None for no tokens."""
    if not tokens:
        return None
    sizes = options.base_image_seq_len, options.max_image_seq_len
    return calculate_shift(tokens, *sizes, options.base_shift, options.max_shift)


def _channels_first(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.swapaxes(tokens, 1, 2)))


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(np.swapaxes(tensor.numpy(), 1, 2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        sys.exit(0 if check(make()) else 1)
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, version=diffusers.__version__, **make())
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes")
