"""Checkpoints: any mesh, whole or absent, and safe from the donation that follows a save."""

import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.errors import LostPeer, Unreachable, UserError
from sora_jax.nn.params import ParamSpec, normal
from sora_jax.parallel import distributed
from sora_jax.parallel.mesh import MeshConfig, make_mesh
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.optim import OptimConfig
from sora_jax.train.state import MODEL, Group, abstract_ema, init_state, make_optimizers

OPTIM = OptimConfig(ema=(0.5, 0.9))
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp and tensor": MeshConfig(data=1, fsdp=2, tensor=4),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "two devices": MeshConfig(data=1, fsdp=2),
    "one device": MeshConfig(data=1),
}


def mesh_named(name):
    return make_mesh(MESHES[name], jax.devices()[: {"two devices": 2, "one device": 1}.get(name, 8)])


def specs(width=16):
    weight = ParamSpec((8, width), ("embed", "hidden"), normal(1.0))
    return {"in": {"weight": weight, "bias": ParamSpec((width,), ("hidden",), normal(1.0))}}


def state_on(mesh, seed=0, width=16, optim=OPTIM):
    """A state in which every array differs from every other."""
    groups = {MODEL: Group(specs(width), optim)}
    state = init_state(groups, make_optimizers(groups, 1), seed, mesh)
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
    mesh = mesh_named(name)
    with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
        like = state_on(mesh)
        found, run = checkpoints.restore(like)
    assert run == {"step": 3, "note": "ä"}
    chex.assert_trees_all_equal(jax.device_get(found), wanted)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, like)


def averages_on(mesh, width=16):
    return abstract_ema({MODEL: Group(specs(width), OPTIM)}, mesh)


def test_averages_alone(saved, tmp_path):
    folder, wanted = tmp_path / "checkpoints", saved[1]
    shutil.copytree(saved[0], folder)
    shutil.rmtree(folder / "3" / "state")  # parameters and optimizer are not looked at
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_ema(averages_on(make_mesh(MESHES["all"])))
    chex.assert_trees_all_equal(jax.device_get(found), wanted.ema)


OTHERS = {
    "width": (dict(width=32), r"state/opt_state/1/mu/in/bias is float32 \(16,\) there, and float32 \(32,\)"),
    "averages": (dict(optim=OptimConfig(ema=(0.5,))), r"ema/1/in/bias is float32 \(16,\) there, and absent"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_one_sentence_and_not_damage(saved, other):
    changes, message = OTHERS[other]
    mesh = make_mesh(MESHES["data"])
    with jax.set_mesh(mesh), Checkpoints(saved[0]) as checkpoints:
        with pytest.raises(UserError, match=rf"^checkpoint 3 in [^\n]* is of another model: {message}[^\n]*$"):
            checkpoints.restore(state_on(mesh, **changes))
        assert checkpoints.latest() == 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Checkpoints 3 and 6, large enough that arrays lie in files."""
    folder, mesh = tmp_path_factory.mktemp("pair"), make_mesh(MESHES["data"])
    with jax.set_mesh(mesh), Checkpoints(folder, keep=2) as checkpoints:
        for step in (3, 6):
            checkpoints.save(step, state_on(mesh, step, 512), {"step": step})
    return folder


@pytest.mark.parametrize("what", ["ema", "state"])
def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_not_damaged(tmp_path, monkeypatch, capsys, what):
    """Training goes on in the moment between the list and the reading; the newest is read then."""
    mesh = mesh_named("one device")

    def save(step):
        with Checkpoints(tmp_path, keep=1) as writing:
            writing.save(step, state_on(mesh, step), {"step": step})

    real, pending = Checkpoints._load, [6, 9]

    def load(self, *arguments):
        if pending:
            save(pending.pop(0))
        return real(self, *arguments)

    with jax.set_mesh(mesh):
        save(3)
        monkeypatch.setattr(Checkpoints, "_load", load)
        with Checkpoints(tmp_path) as reading:
            found = reading.restore_ema(averages_on(mesh)) if what == "ema" else reading.restore(state_on(mesh))[0].ema
            wanted = state_on(mesh, 9).ema
            assert reading.candidates() == [9]
        chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(wanted))
        pending.append(12)
        with Checkpoints(tmp_path) as reading, pytest.raises(UserError, match="'9'; the whole checkpoints .* are 12$"):
            reading.restore_ema(averages_on(mesh), "9")
    assert "damaged" not in capsys.readouterr().err


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def shorten(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "values are cut short": lambda step: shorten(largest(step / "state")),
    "one bit of a value": lambda step: flip_one_bit(largest(step / "state")),
    "an average is missing": lambda step: shutil.rmtree(step / "ema"),
    "an empty list of arrays": lambda step: (step / "state" / "_METADATA").write_text(""),
    "half of the notes": lambda step: shorten(step / "run" / "metadata"),
    "half of the table": lambda step: shorten(step / "arrays" / "metadata"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(pair, tmp_path, capfd, damage):
    folder, mesh = tmp_path / "checkpoints", make_mesh(MESHES["data"])
    shutil.copytree(pair, folder)
    DAMAGE[damage](folder / "6")
    told = f"sora-jax: checkpoint 6 in {folder} is damaged, checkpoint 3 is used: "
    with jax.set_mesh(mesh), Checkpoints(folder) as reading:
        _, run = reading.restore(state_on(mesh, width=512))
        assert run == {"step": 3} and reading.latest() == 3
    assert (folder / "6").exists()  # who only reads moves nothing
    assert sum(line.startswith(told) for line in capfd.readouterr().err.splitlines()) == 1
    with jax.set_mesh(mesh), Checkpoints(folder, keep=2) as checkpoints:
        state, _ = checkpoints.restore(state_on(mesh, width=512))
        chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(state_on(mesh, 3, 512)))
        checkpoints.save(6, state_on(mesh, 9, 512), {"step": 6})
    assert (folder / "damaged-6").is_dir()
    with jax.set_mesh(mesh), Checkpoints(folder) as reading:
        state, _ = reading.restore(state_on(mesh, width=512))
    assert int(state.step) == 9


def test_sampling_passes_a_damaged_average(pair, tmp_path, capfd):
    folder = tmp_path / "checkpoints"
    shutil.copytree(pair, folder)
    flip_one_bit(largest(folder / "6" / "ema"))
    mesh = make_mesh(MESHES["all"])
    with Checkpoints(folder) as checkpoints:
        found = checkpoints.restore_ema(averages_on(mesh, 512))[MODEL][0]
        assert checkpoints.latest() == 3
    with jax.set_mesh(mesh):
        wanted = state_on(mesh, 3, 512).ema[MODEL][0]
    chex.assert_trees_all_equal(jax.device_get(found), jax.device_get(wanted))
    assert re.search(r"checkpoint 6 in .* is damaged, checkpoint 3 is used: ", capfd.readouterr().err)


def test_nothing_whole_is_one_sentence(pair, tmp_path, capfd):
    folder, mesh = tmp_path / "checkpoints", make_mesh(MESHES["data"])
    shutil.copytree(pair, folder)
    for step in ("3", "6"):
        shutil.rmtree(folder / step / "state")
    with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
        with pytest.raises(UserError, match=r"^there is no whole checkpoint in [^\n]*$"):
            checkpoints.restore(state_on(mesh, width=512))
    assert "checkpoint 3 in" in capfd.readouterr().err


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


def test_the_best_are_kept_beside_the_newest_also_over_a_restart(tmp_path):
    mesh = make_mesh(MESHES["data"])
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0, 6: 6.0, 7: 7.0}
    for steps in ((1, 2, 3, 4), (5, 6, 7)):
        with jax.set_mesh(mesh), Checkpoints(tmp_path, keep=1, best=2) as checkpoints:
            for step in steps:
                checkpoints.save(step, state_on(mesh, seed=step), {}, losses[step])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()) == ["2", "4", "7"]
    with jax.set_mesh(mesh), Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(state_on(mesh))[0].step) == 7


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
        chex.assert_trees_all_equal(jax.device_get(found), copies[step])
        shutil.rmtree(tmp_path / str(step))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Checkpoints 1 to 4; all but the last have a metric, and that of 2 is best."""
    folder, mesh = tmp_path_factory.mktemp("measured"), make_mesh(MESHES["one device"], jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(folder, keep=4) as checkpoints:
        for step, metric in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
            checkpoints.save(step, state_on(mesh, step), {"step": step}, metric)
    return folder


@pytest.mark.parametrize("which, step", [("newest", 4), ("best", 2), ("3", 3), ("1", 1)])
def test_the_checkpoint_that_is_asked_for(measured, which, step):
    mesh = make_mesh(MESHES["one device"], jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(measured) as checkpoints:
        found = checkpoints.restore_ema(averages_on(mesh), which)[MODEL][0]
        assert checkpoints.candidates(which)[0] == step
        wanted = jax.device_get(state_on(mesh, step).ema[MODEL][0])
    chex.assert_trees_all_equal(jax.device_get(found), wanted)


@pytest.mark.parametrize(
    "which, then, told", [("best", 3, "checkpoint 3 is used"), ("2", None, "there is none before")]
)
def test_a_damaged_one_that_is_asked_for(measured, tmp_path, capfd, which, then, told):
    folder, mesh = tmp_path / "checkpoints", make_mesh(MESHES["one device"], jax.devices()[:1])
    shutil.copytree(measured, folder)
    shutil.rmtree(folder / "2" / "ema")
    with jax.set_mesh(mesh), Checkpoints(folder) as checkpoints:
        if then is None:
            with pytest.raises(UserError, match=f"^there is no whole checkpoint in {folder} that is '2'$"):
                checkpoints.restore_ema(averages_on(mesh), which)
        else:
            checkpoints.restore_ema(averages_on(mesh), which)
            assert checkpoints.candidates(which)[0] == then
    assert f"checkpoint 2 in {folder} is damaged, {told}" in capfd.readouterr().err


def test_a_checkpoint_that_is_not_there_is_one_sentence(measured, saved):
    with Checkpoints(measured) as checkpoints:
        for which, message in (("7", "are 1, 2, 3, 4$"), ("fine", "allowed: newest, best, or a step: 1, 2, 3, 4$")):
            with pytest.raises(UserError, match=f"^--checkpoint is '{which}'; [^\n]*({message})"):
                checkpoints.candidates(which)
    with Checkpoints(saved[0]) as checkpoints:
        with pytest.raises(UserError, match="^--checkpoint is 'best'; those in .* have no metric: train with"):
            checkpoints.candidates("best")


@pytest.mark.parametrize(
    "said, kind, code",
    [
        ("UNAVAILABLE: Error writing gs://b/run/checkpoints/10/state: HTTP 503", Unreachable, 75),
        ("DEADLINE_EXCEEDED: Error reading gs://b/run/checkpoints/10/state", Unreachable, 75),
        ("PERMISSION_DENIED: Error writing gs://b/run/checkpoints/10/state: HTTP 403", UserError, 2),
        ("UNAVAILABLE: Gloo AllGather failed: Connection closed by peer", LostPeer, 75),
    ],
)
def test_a_store_that_does_not_answer_is_no_lost_peer(saved, monkeypatch, said, kind, code):
    def fail(*_, **__):
        raise ValueError(said)

    monkeypatch.setattr(distributed, "several", lambda: True)
    with Checkpoints(saved[0]) as checkpoints:
        checkpoints._folder = "gs://b/run/checkpoints"
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        with pytest.raises(kind) as told, distributed.peers():
            checkpoints.wait()
        assert type(told.value) is kind and told.value.code == code and said in str(told.value)
        monkeypatch.undo()
