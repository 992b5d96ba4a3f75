"""Save and restore checkpoints by Orbax: asynchronous, complete or absent, checked when read.

The only file that imports orbax; where it is used, since that takes as long as importing JAX, and exported models need
none.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import serialization

from sora_jax.config import check
from sora_jax.errors import Unreachable, UserError
from sora_jax.files import REMOTE, as_path, is_remote, is_storage_error, remove_folder
from sora_jax.parallel import distributed
from sora_jax.train.state import TrainState, from_stored, to_stored

STATE, EMA, RUN, ARRAYS = "state", "ema", "run", "arrays"
NEWEST, BEST = "newest", "best"
ASIDE = "damaged-"
# Words in TensorStore's errors when a store does not answer, or refuses: they say nothing of what is in it.
SILENT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")
REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "Forbidden")
PEERS = ("Gloo", "NCCL")  # words in errors of a lost process, which otherwise read like those of a store

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of every option that reading alone implies


class Checkpoints:
    """Read and write the checkpoints of a run folder; a context manager: leaving without closing loses the last save.

    With `keep=None` it only reads, and may do so while another process trains in the same folder. The newest `keep` are
    kept, and the `best` ones with the smallest metric. Each holds a table of its arrays with shapes and digests: a
    checkpoint that does not agree with its table is reported, and the previous one is used. option: how the user says
    which one to read.
    """

    def __init__(self, folder: Path, keep: int | None = None, best: int = 0, option: str = "--checkpoint"):
        import orbax.checkpoint as ocp

        folder = as_path(folder)
        self._folder, self._writes, self._option = folder, keep is not None, option
        self._damaged: set[int] = set()
        if not is_remote(folder):
            self._folder = folder.absolute()
        if keep is None:
            options = ocp.CheckpointManagerOptions(read_only=True, best_fn=_metric, best_mode="min")
        else:
            policy = _policy(keep, best)
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=_metric, best_mode="min", create=True, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_names=(STATE, EMA, RUN, ARRAYS))
        # Processes read without waiting for each other: one that finds damage would leave the others waiting.
        here = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(), multiprocessing_options=alone)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.wait()
        finally:
            self._manager.close()
            self._reader.close()

    def wait(self) -> None:
        """Wait until the last save is complete; UserError if it has failed."""
        with _one_sentence(f"a checkpoint could not be saved in {self._folder}"):
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """Return the newest complete step, without those that `restore` has found damaged."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        return sorted(set(self._manager.all_steps()) - self._damaged)

    def save(self, step: int, state: TrainState, run: dict, metric: float | None = None) -> None:
        """Start saving in the background; `run` (config, data position) is kept beside the arrays as JSON.

        metric: ranks checkpoints, smaller is better. UserError if there is no room, or if the previous save has failed.
        """
        import orbax.checkpoint as ocp

        if self.latest() == step:
            return
        _check_room(self._folder, sum(x.nbytes for x in jax.tree.leaves(state)))
        tree = to_stored(state)
        ema = tree.pop("ema")
        items = {
            STATE: ocp.args.StandardSave(tree),
            EMA: ocp.args.StandardSave(ema),
            RUN: ocp.args.JsonSave(run),
            ARRAYS: ocp.args.JsonSave({STATE: _table(tree), EMA: _table(ema)}),
        }
        metrics = None if metric is None else {"metric": metric}
        with _one_sentence(f"a checkpoint could not be saved in {self._folder}"):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(
        self, state: TrainState, structure: Callable[[dict], TrainState] | None = None
    ) -> tuple[TrainState, dict]:
        """Restore the newest whole checkpoint in the structure and shardings of `state`, and what was saved as `run`.

        structure(run): the state, which may be abstract, of a checkpoint that may have another structure than `state`.
        Damaged ones are reported and set aside. UserError if none is whole, or if it is of another model.
        """
        like = state

        def trees(run: dict) -> dict:
            nonlocal like
            like = structure(run) if structure else state
            tree = to_stored(like)
            ema = tree.pop("ema")
            return {STATE: tree, EMA: ema}

        found = self._first_whole(trees, RUN)
        return from_stored(like, found[STATE] | {"ema": found[EMA]}), found[RUN]

    def examine(self, step: int, structure: Callable[[dict], TrainState]) -> tuple[TrainState | None, str]:
        """Return the state of one checkpoint, and why it is damaged ("" if it is whole).

        structure: see `restore`. UserError if the checkpoint is of another model.
        """
        trees: dict = {}

        def stored(run: dict) -> dict:
            trees["like"] = structure(run)
            tree = to_stored(trees["like"])
            return {EMA: tree.pop("ema"), STATE: tree}

        found, reason = self._attempt(step, stored, (RUN,))
        if reason := reason or _difference(found.get(ARRAYS), {name: found[name] for name in (STATE, EMA)}):
            return None, reason
        return from_stored(trees["like"], found[STATE] | {"ema": found[EMA]}), ""

    def restore_ema(self, averages: dict | Callable[[dict], dict], which: str = NEWEST) -> dict[str, tuple]:
        """Restore the averages alone.

        averages: their structure and shardings, see `state.abstract_ema`, or a function that makes them of what was
        saved as `run`. which: "newest", "best" or a step, see `candidates`.
        """
        target: dict[str, tuple] = {}

        def trees(run: dict) -> dict:
            nonlocal target
            target = averages(run) if callable(averages) else averages
            like = serialization.to_state_dict(target)
            return {EMA: like[next(iter(like))] if len(target) == 1 else like}  # a single group has no name there

        found = self._first_whole(trees, which=which)[EMA]
        return serialization.from_state_dict(target, {next(iter(target)): found} if len(target) == 1 else found)

    def candidates(self, which: str = NEWEST) -> list[int]:
        """List the steps to try for checkpoint "newest", "best" (smallest metric) or STEP, in order.

        Returns [] where there is no checkpoint at all; UserError where none fits.
        """
        there = self._steps()
        if which == NEWEST or not there:
            return there[::-1]
        if which == BEST:
            metrics = {step: self._manager.metrics(step) for step in there}
            measured = [step for step in there if metrics[step]]
            check(
                bool(measured),
                f"{self._option} is {BEST!r}; those in {self._folder} have no metric: train with loop.keep_best > 0",
            )
            return sorted(measured, key=lambda step: _metric(metrics[step]))
        known = ", ".join(map(str, there))
        check(which.isdecimal(), f"{self._option} is {which!r}; allowed: {NEWEST}, {BEST}, or a step: {known}")
        check(int(which) in there, f"{self._option} is {which!r}; the whole checkpoints in {self._folder} are {known}")
        return [int(which)]

    def _first_whole(self, trees: dict | Callable[[dict], dict], *notes: str, which: str = NEWEST) -> dict:
        """Read `trees` and the JSON items `notes` from the first checkpoint that is whole.

        trees: by item, or a function that makes them of what was saved as `run`.
        """
        steps = self.candidates(which)
        for i, step in enumerate(steps):
            try:
                found, reason = self._attempt(step, trees, notes)
            except UserError:
                if not self._moved_on(steps, which):
                    raise
                found, reason = {}, "it is gone"
            if distributed.all_true(not reason):
                reason = _difference(found.get(ARRAYS), {x: found[x] for x in (STATE, EMA) if x in found})
                if not reason:
                    return found
            if not distributed.all_true(not self._moved_on(steps, which)):
                return self._first_whole(trees, *notes, which=which)
            self._set_aside(step, reason or "another process cannot read it", steps[i + 1 :])
        raise UserError(f"there is no whole checkpoint in {self._folder}" + f" that is {which!r}" * (which != NEWEST))

    def _attempt(self, step: int, trees: dict | Callable[[dict], dict], notes: tuple[str, ...]) -> tuple[dict, str]:
        """Return what checkpoint `step` holds, and why it is damaged ("" if not); UserError for another model."""
        what = f"checkpoint {step} in {self._folder} is"
        if not self._has_table(step):
            with _one_sentence(f"{what} damaged or of another model"):
                return self._load(step, self._resolved(step, trees), notes), ""
        try:
            trees = self._resolved(step, trees)
            table = self._load(step, {}, (ARRAYS,))[ARRAYS]
            for name, tree in trees.items():
                _check_model(table[name], tree, f"{what} of another model: {name}")
            return self._load(step, trees, (*notes, ARRAYS)), ""
        except (UserError, PermissionError, MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # damaged files make Orbax, TensorStore and JSON raise errors of any type
            if _of_store(error):
                message = f"checkpoint {step} in {self._folder} cannot be read: {_first_line(error)}"
                raise _kind(error, message)(message) from error
            return {}, _first_line(error)

    def _resolved(self, step: int, trees: dict | Callable[[dict], dict]) -> dict:
        return trees(self._load(step, {}, (RUN,))[RUN]) if callable(trees) else trees

    def _moved_on(self, steps: list[int], which: str) -> bool:
        """Return True if other checkpoints are there by now: a run that trains has removed the one that was read."""
        if self._writes:
            return False
        self._manager.reload()
        return self.candidates(which) != steps

    def _has_table(self, step: int) -> bool:
        # Checkpoints of earlier versions have none. One that has lost it has lost its list of items, or is damaged.
        return (self._folder / str(step) / ARRAYS).exists()

    def _load(self, step: int, trees: dict, notes: tuple[str, ...]) -> dict:
        import orbax.checkpoint as ocp

        items = {name: ocp.args.StandardRestore(_like(tree)) for name, tree in trees.items()}
        items |= {name: ocp.args.JsonRestore() for name in notes}
        return dict(self._reader.restore(self._folder / str(step), args=ocp.args.Composite(**items)).items())

    def _set_aside(self, step: int, reason: str, others: list[int]) -> None:
        """Report a damaged checkpoint and move it away; a process that only reads leaves everything where it is."""
        if distributed.first():
            use = f"checkpoint {others[0]} is used" if others else "there is none before it"
            print(f"sora-jax: checkpoint {step} in {self._folder} is damaged, {use}: {reason}", file=sys.stderr)
        self._damaged.add(step)
        if not self._writes:
            return
        if distributed.first():
            _move_aside(self._folder, step)
        distributed.barrier(f"set aside {step}")
        self._manager.reload()


def _policy(keep: int, best: int):
    import orbax.checkpoint as ocp

    policies = ocp.checkpoint_managers
    newest = policies.LatestN(keep)
    if not best:
        return newest
    # BestN keeps the last of the order: reversed, those with the smallest metric.
    smallest = policies.BestN(get_metric_fn=_metric, reverse=True, n=best, keep_checkpoints_without_metrics=False)
    return policies.AnyPreservationPolicy([newest, smallest])


def _metric(metrics: dict) -> float:
    return metrics["metric"]


def _move_aside(folder: Path, step: int) -> None:
    target = folder / f"{ASIDE}{step}"
    if target.exists():
        remove_folder(target)
    (folder / str(step)).rename(target)


def _check_model(saved: dict, tree, what: str) -> None:
    """Raise a UserError that names the first array which differs from the table of the checkpoint."""
    wanted = {name: (x.dtype, x.shape) for name, x in _named(tree).items()}
    saved = {name: (jnp.dtype(dtype), tuple(shape)) for name, (dtype, shape, _) in saved.items()}
    for name in sorted(wanted.keys() | saved.keys()):
        here, there = ("{} {}".format(*table[name]) if name in table else "absent" for table in (wanted, saved))
        check(here == there, f"{what}/{name} is {there} there, and {here} in this one")


def _named(tree) -> dict[str, jax.Array]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _table(tree) -> dict[str, list]:
    """Return a table: name -> dtype, shape, digest."""
    arrays = _named(tree)
    digests = jax.device_get(_digests(list(arrays.values()))).tolist()
    return {name: [str(x.dtype), list(x.shape), d] for (name, x), d in zip(arrays.items(), digests, strict=True)}


def digest_of(tree) -> str:
    """Return a hex digest of the arrays of a tree, the same on every mesh."""
    return hashlib.sha256(json.dumps(_table(tree), sort_keys=True).encode()).hexdigest()


def _difference(saved: dict | None, trees: dict) -> str:
    """Say in one line which array is not what was saved; "" if all are, or if nothing is known of them."""
    if not saved:
        return ""
    for name, tree in trees.items():
        for array, (*_, digest) in _table(tree).items():
            if digest != saved[name][array][2]:
                return f"the values of {name}/{array} are not those that were saved"
    return ""


@jax.jit
def _digests(arrays: list[jax.Array]) -> jax.Array:
    """Return one number for each array: a sum of its bits, weighted by place, modulo 2**32; the same on every mesh."""
    return jnp.stack([_digest(x) for x in arrays])


def _digest(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    for axis in range(x.ndim):
        bits = bits * (2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + 1)
    return bits.sum(dtype=jnp.uint32)


@contextlib.contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn an error of Orbax, which may have many lines and types, into one sentence."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, (ValueError, KeyError, TypeError, OSError)) and not is_storage_error(error):
            raise
        message = f"{what}: {_first_line(error)}"
        raise _kind(error, message)(message) from error


def _of_store(error: Exception) -> bool:
    """Return True if the store refuses or does not answer; a file that is not there is an answer."""
    absent = isinstance(error, FileNotFoundError)
    return any(word in str(error) for word in SILENT + REFUSED) or (is_storage_error(error) and not absent)


def _kind(error: Exception, message: str) -> type[UserError]:
    """Return the type of error: Unreachable where the same may succeed at another time."""
    other = any(word in str(error) for word in REFUSED + PEERS)
    return Unreachable if REMOTE in message and _of_store(error) and not other else UserError


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [""])[0].partition(" See full TensorStore details")[0]
    return line[:300] or type(error).__name__


def _check_room(folder: Path, wanted: int) -> None:
    # Checked first: a disk that fills up during a save makes the threads of the library print a flood of messages.
    free = math.inf if is_remote(folder) else shutil.disk_usage(folder).free
    check(
        distributed.all_true(free > 1.1 * wanted),
        f"the disk of {folder} has {free / 1e6:.0f} MB left; a checkpoint needs {wanted / 1e6:.0f} MB",
    )


def _like(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save_tree(folder: Path, tree: dict) -> None:
    """Save a tree of arrays in a folder of its own, in place of what is there; all processes take part."""
    import orbax.checkpoint as ocp

    folder = folder if is_remote(folder) else as_path(folder).absolute()
    if distributed.first() and folder.exists():
        remove_folder(folder)
    distributed.barrier(f"{folder.name} removed")
    with _one_sentence(f"weights could not be saved in {folder}"), ocp.StandardCheckpointer() as saver:
        saver.save(folder, tree)


def restore_tree(folder: Path, like: dict) -> dict:
    """Restore what `save_tree` saved, in the structure and shardings of `like`."""
    import orbax.checkpoint as ocp

    folder = folder if is_remote(folder) else as_path(folder).absolute()
    with _one_sentence(f"the weights in {folder} cannot be read"), ocp.StandardCheckpointer() as reader:
        return reader.restore(folder, like)
