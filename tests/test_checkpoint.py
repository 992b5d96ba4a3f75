"""Checkpoints: any mesh, whole or absent, and safe from the donation that follows a save."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.errors import UserError
from sora_jax.nn.params import ParamSpec, abstract_on, normal
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.optim import OptimConfig, make_optimizer
from sora_jax.train.state import init_state

OPTIM = OptimConfig(ema=(0.5, 0.9))
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp and tensor": MeshConfig(data=1, fsdp=2, tensor=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
}


def specs(width=16):
    weight = ParamSpec((8, width), ("embed", "hidden"), normal(1.0))
    return {"in": {"weight": weight, "bias": ParamSpec((width,), ("hidden",), normal(1.0))}}


def state_on(mesh, seed=0, width=16, optim=OPTIM):
    """A state in which every array differs from every other."""
    state = init_state(specs(width), make_optimizer(optim), len(optim.ema), seed, mesh)
    leaves, tree = jax.tree.flatten(state)
    return jax.tree.unflatten(tree, [x + jnp.asarray(seed + i, x.dtype) for i, x in enumerate(leaves)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of step 3, written on a mesh of fsdp=2 and tensor=4; the folder and its host copy."""
    folder, mesh = tmp_path_factory.mktemp("saved"), make_mesh(MESHES["fsdp and tensor"])
    with jax.set_mesh(mesh), Checkpoints(folder, keep=2) as checkpoints:
        state = state_on(mesh, seed=5)
        checkpoints.save(3, state, {"step": 3, "note": "ä"})
    return folder, jax.device_get(state)


@pytest.mark.parametrize("name", MESHES)
def test_restored_on_any_mesh(saved, name):
    folder, wanted = saved
    mesh = make_mesh(MESHES[name])
    with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
        like = state_on(mesh)
        found, run = checkpoints.restore(like)
    assert run == {"step": 3, "note": "ä"}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)


@pytest.mark.parametrize("index", [0, 1])
def test_one_average_alone(saved, index):
    folder, wanted = saved
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_ema(abstract_on(specs(), make_mesh(MESHES["all"])), 2, index)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), wanted.ema[index])


@pytest.mark.parametrize("other", [dict(width=32), dict(optim=OptimConfig(ema=(0.5,)))], ids=["width", "averages"])
def test_another_model_is_one_sentence(saved, other):
    mesh = make_mesh(MESHES["data"])
    with jax.set_mesh(mesh), Checkpoints(saved[0]) as checkpoints:
        with pytest.raises(UserError, match=r"^checkpoint 3 in [^\n]* is damaged or of another model[^\n]*$"):
            checkpoints.restore(state_on(mesh, **other))


def test_half_written_checkpoints_are_ignored_and_swept(saved, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0], folder)
    half = folder / "7.orbax-checkpoint-tmp"
    shutil.copytree(folder / "3", half)
    shutil.rmtree(half / "state")
    with Checkpoints(folder) as reading:
        assert reading.latest() == 3
    assert half.exists()  # it may be another process that is just writing it
    mesh = make_mesh(MESHES["data"])
    with jax.set_mesh(mesh), Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        checkpoints.save(7, state_on(mesh), {})
    assert not half.exists() and (folder / "7" / "state").is_dir()


def test_reading_makes_no_folder(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest() is None
    assert not (tmp_path / "none").exists()


def test_the_newest_are_kept(saved, tmp_path):
    mesh = make_mesh(MESHES["data"])
    with jax.set_mesh(mesh), Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 2, 5):
            checkpoints.save(step, state_on(mesh, seed=step), {})
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "5"]


@pytest.mark.parametrize("devices", [1, 8])
def test_donation_right_after_a_save_spoils_nothing(tmp_path, devices):
    """The arrays that a save in the background still reads are given away by the very next step."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    with jax.set_mesh(mesh), Checkpoints(tmp_path, keep=9) as checkpoints:
        state, copies = state_on(mesh, width=2**16), {}
        for step in range(1, 4):
            copies[step] = jax.tree.map(np.array, jax.device_get(state))
            checkpoints.save(step, state, {})
            for _ in range(20):
                state = advance(state)
    for step in (3, 2, 1):
        with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.latest() == step
            found, _ = checkpoints.restore(state_on(mesh, width=2**16))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), copies[step])
        shutil.rmtree(tmp_path / str(step))
