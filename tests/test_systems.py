"""Many systems under one roof: networks, kinds of run and groups of weights of a stranger, by the same commands."""

import dataclasses
import functools
import itertools
import json
from typing import Annotated, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_classifier
import toy_denoiser
from fixtures_runs import ROOT, chain, run, write_clips  # noqa: F401

from sora_jax.config import OneOf, from_dict, to_dict
from sora_jax.data.reading.media import decode
from sora_jax.errors import UserError
from sora_jax.kinds import KINDS, kind_of, run_config
from sora_jax.models.autoencoder import AutoencoderConfig
from sora_jax.models.denoiser import MODULES
from sora_jax.nn.params import ParamSpec, normal
from sora_jax.parallel.mesh import make_mesh
from sora_jax.plan import report
from sora_jax.train.loop import Job, LoopConfig, fit
from sora_jax.train.metrics import read_metrics
from sora_jax.train.optim import OptimConfig
from sora_jax.train.state import Group, init_state, make_optimizers
from sora_jax.train.step import gradients, make_step

SHORT = ["--config.loop.steps=4", "--config.loop.save_every=2", "--config.loop.log_every=1", "--config.batch=8"]


@pytest.fixture(autouse=True)
def one_line_each(monkeypatch):
    """Both toys are in their tables: a line each."""
    monkeypatch.setitem(MODULES, toy_denoiser.ToyConfig, toy_denoiser)
    monkeypatch.setitem(KINDS, "toy_classifier", toy_classifier.CLASSIFIER)


def write_config(path, *lines: str):
    """A config file of a user, whose get_config returns the last line."""
    head = ["from sora_jax.config import to_config_dict", *lines[:-1], "def get_config(variant=''):"]
    path.write_text("\n".join([*head, f"    return to_config_dict({lines[-1]})"]))
    return f"--config={path}"


def same_runs(one, other) -> None:
    """Two run folders have the same losses and norms of parameters at every step, to the bit."""
    first, second = (read_metrics(folder) for folder in (one, other))
    assert [row["step"] for row in first] == [row["step"] for row in second] == [1, 2, 3, 4]
    for a, b in zip(first, second, strict=True):
        assert (a["loss"], a["parameter_norm"]) == (b["loss"], b["parameter_norm"])


# --- a network ---


@pytest.fixture(scope="module")
def toy_run(chain, tmp_path_factory):  # noqa: F811
    """The config file and the folder of a finished run of the toy denoiser."""
    folder = tmp_path_factory.mktemp("toy")
    lines = ["from toy_denoiser import ToyConfig", "from sora_jax.train.denoiser import DenoiserRun"]
    lines += ["from sora_jax.data.packing.packs import PackingConfig"]
    packing = "packing=PackingConfig(length=48, slots=4)"
    config = write_config(folder / "toy.py", *lines, f"DenoiserRun(model=ToyConfig(), {packing})")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODULES, toy_denoiser.ToyConfig, toy_denoiser)
        assert run("train", config, f"--workdir={folder / 'run'}", f"--config.latents={chain.latents}", *SHORT) == 0
    return config, folder / "run"


def test_a_network_is_one_module_and_one_line(toy_run):
    """It is trained and kept by name; the toy has some thirty lines of code."""
    kept = json.loads((toy_run[1] / "config.json").read_text())
    assert kept["kind"] == "denoiser" and kept["model"]["name"] == "toy"
    assert run_config(kept).model == toy_denoiser.ToyConfig()
    losses = [row["loss"] for row in read_metrics(toy_run[1])]
    assert len(losses) == 4 and np.isfinite(losses).all() and len(set(losses)) == 4


def test_a_strangers_network_goes_on_to_the_bit(toy_run, chain, tmp_path):  # noqa: F811
    config, straight = toy_run
    train = ["train", config, f"--workdir={tmp_path / 'run'}", f"--config.latents={chain.latents}", *SHORT]
    assert run(*train, "--config.loop.steps=2") == 0
    assert run(*train) == 0
    same_runs(tmp_path / "run", straight)


def test_a_strangers_network_is_sampled(toy_run, tmp_path, capsys):
    """It takes neither prompts nor classes: a clip for each size."""
    out = tmp_path / "clip.gif"
    sample = [
        "sample",
        f"--workdir={toy_run[1]}",
        "--frames=5",
        "--height=16",
        "--width=24",
        "--steps=2",
        "--guidance=1",
        "--upscale=1",
    ]
    assert run(*sample, f"--out={out}") == 0
    assert decode(out).frames.shape == (5, 16, 24, 3)
    assert run(*sample, "--prompt=a red square", f"--out={out}") == 2
    assert "takes neither prompts nor classes" in capsys.readouterr().err


@pytest.fixture
def planned(monkeypatch, capsys):
    """planned(options...): the JSON of `sora-jax plan`, compiled for four CPU devices in place of four chips."""
    monkeypatch.setattr(report, "topology_mesh", lambda config, topology: make_mesh(config, jax.devices("cpu")[:4]))

    def plan(*options):
        assert run("plan", *options, "--topology=v5e:2x2", "--json") == 0
        return json.loads(capsys.readouterr().out)

    return plan


@pytest.mark.parametrize("what", ["train", "sample"])
def test_a_strangers_network_is_planned(toy_run, planned, what):
    found = planned(toy_run[0], f"--what={what}", "--config.batch=8", "--config.sampling.steps=2")
    values = toy_denoiser.ToyConfig().patch_values
    assert found["fits"] and found["parameters"] == values**2 + values and found["flops"] > 0


def test_members_of_a_union_are_told_apart_by_name_and_not_by_fields():
    @dataclasses.dataclass(frozen=True)
    class Larger(AutoencoderConfig):
        """All fields of the other member, and one more."""

        extra: int = 0
        name: Literal["larger"] = "larger"

    member = Annotated[AutoencoderConfig, OneOf({Larger: None, AutoencoderConfig: None})]
    Holder = dataclasses.make_dataclass("Holder", [("model", member, AutoencoderConfig())])
    for model in (AutoencoderConfig(), Larger(), Larger(extra=3)):
        assert from_dict(Holder, to_dict(Holder(model))).model == model
    with pytest.raises(UserError, match=r"^config.model.name is 'none'; allowed: 'larger', 'causal'$"):
        from_dict(Holder, {"model": {"name": "none"}})


# --- a kind of run ---


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    """The config file and the folder of a finished run of the toy classifier, and the options that it had."""
    folder = tmp_path_factory.mktemp("classifier")
    write_clips(folder / "clips")
    table = folder / "clips" / "captions.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join([f"{rows[0]},label", *(f"{row},{i % 2}" for i, row in enumerate(rows[1:]))]))
    data = folder / "data"
    build = ["data", "build", f"--path={folder / 'clips'}", f"--out={data}", "--max-frames=9", "--multiple=8"]
    assert run(*build, "--max-pixels=384") == 0
    config = write_config(folder / "toy.py", "from toy_classifier import ClassifierRun", "ClassifierRun()")
    options = [
        config,
        f"--config.data={data}",
        *SHORT,
        "--config.optim.learning_rate=0.003",
        "--config.optim.warmup_steps=0",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "toy_classifier", toy_classifier.CLASSIFIER)
        assert run("train", *options, f"--workdir={folder / 'run'}") == 0
    return options, folder / "run"


def test_a_kind_of_run_is_one_module_and_one_line(classified):
    assert json.loads((classified[1] / "config.json").read_text())["kind"] == "toy_classifier"
    rows = read_metrics(classified[1])
    assert all(np.isfinite(row["loss"]) and 0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=0.1)  # of two classes, before anything is learnt
    assert json.loads((classified[1] / "classes.json").read_text()) == {"classes": 2, "step": 4}
    lines = (ROOT / "tests" / "toy_classifier.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 80


def test_a_strangers_kind_goes_on_to_the_bit_and_keeps_its_config(classified, tmp_path, capsys):
    options, straight = classified
    assert run("train", *options, f"--workdir={tmp_path / 'run'}", "--config.loop.steps=2") == 0
    assert run("train", *options, f"--workdir={tmp_path / 'run'}") == 0
    same_runs(tmp_path / "run", straight)
    capsys.readouterr()
    assert run("train", *options, f"--workdir={tmp_path / 'run'}", "--config.classes=3") == 2
    assert "another config.classes" in capsys.readouterr().err


def test_a_strangers_kind_is_planned_described_and_refused_by_what_it_cannot_do(classified, planned, capsys):
    options, folder = classified
    assert planned(*options)["parameters"] == 8 * 8 * 3 * 2
    assert run("train", *options, "--workdir=unused", "--dry-run") == 0
    assert "total                   384" in capsys.readouterr().out
    assert run("plan", *options, "--topology=v5e:2x2", "--what=sample") == 2
    assert "for a config of kind 'toy_classifier', is 'sample'; allowed: 'train'" in capsys.readouterr().err
    assert run("sample", f"--workdir={folder}", "--prompt=a", f"--out={folder / 'a.gif'}") == 2
    assert "that run is of kind 'toy_classifier', and it must be 'denoiser'" in capsys.readouterr().err


def test_each_kind_is_in_the_table_by_its_own_name():
    assert all(kind.name == name == kind_of(kind.config()).name for name, kind in KINDS.items())


# --- groups of weights ---

START = 2  # the step from which the two compete
GROUPS = {
    "generator": Group({"weight": ParamSpec((3, 4), (None, None), normal(1.0))}, OptimConfig(0.01, warmup_steps=0)),
    "discriminator": Group(
        {"weight": ParamSpec((4,), (None,), normal(1.0)), "bias": ParamSpec((), (), normal(1.0))},
        OptimConfig(0.05, warmup_steps=0, b1=0.5, clip_norm=0.0, weight_decay=0.1, ema=(0.5, 0.9)),
    ),
}


def score(params, clip):
    return clip @ params["discriminator"]["weight"] + params["discriminator"]["bias"]


def generator_loss(params, frozen, batch, step):
    made = jnp.tanh(batch["z"] @ params["generator"]["weight"])
    error = (frozen["scale"][None] * (made - batch["x"]) ** 2).sum()
    return error - jnp.where(step >= START, score(params, made).sum(), 0.0)


def discriminator_loss(params, frozen, batch, step):
    made = jnp.tanh(batch["z"] @ params["generator"]["weight"])
    hinge = jax.nn.relu(1 - score(params, batch["x"])) + jax.nn.relu(1 + score(params, made))
    return jnp.where(step >= START, hinge.sum(), 0.0)


def game(params, frozen, batch, step, part):
    """Neither loss stops a gradient: each group gets that of its own all the same."""
    count = jnp.float32(batch["x"].shape[0])
    weights = {"generator": count, "discriminator": jnp.where(step >= START, count, 0.0)}
    sums = {"generator": generator_loss(params, frozen, batch, step)}
    sums |= {"discriminator": discriminator_loss(params, frozen, batch, step)}
    return sums, (weights, {"made": (count, count)})


FROZEN = {"scale": jnp.array([1.0, 2.0, 3.0, 4.0])}


def game_batch(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {"z": rng.standard_normal((4, 3), np.float32), "x": rng.standard_normal((4, 4), np.float32)}


def game_job(**changes) -> Job:
    def batches(start, position):
        return ((game_batch(step), None) for step in itertools.count(start))

    counts = lambda batch: {"clips": len(batch["x"])}  # noqa: E731
    job = Job("game", GROUPS, game, batches, lambda batch: batch, counts, lambda batch: [], frozen=FROZEN)
    return dataclasses.replace(job, **changes)


def play(workdir, steps, **changes):
    workdir.mkdir(exist_ok=True)
    config = LoopConfig(steps=steps, log_every=1, save_every=2, accumulate=changes.pop("accumulate", 1))
    return fit(game_job(**changes), config, 0, make_mesh(devices=jax.devices()[:1]), workdir, {})


@pytest.mark.parametrize("step", [0, START])
def test_the_gradient_of_a_group_is_that_of_its_own_loss_alone(step):
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32),
        {name: group.specs for name, group in GROUPS.items()},
        is_leaf=lambda x: isinstance(x, ParamSpec),
    )
    batch = game_batch(0)
    found, *_ = jax.jit(functools.partial(gradients, game))(params, FROZEN, batch, step, 0)
    for name, loss in (("generator", generator_loss), ("discriminator", discriminator_loss)):
        own = lambda tree, name=name, loss=loss: loss(params | {name: tree}, FROZEN, batch, step)  # noqa: E731
        alone = jax.grad(own)(params[name])
        chex.assert_trees_all_close(found[name], alone, rtol=1e-6, atol=1e-6)
    assert (np.abs(found["discriminator"]["weight"]).max() > 0) == (step >= START)


def test_groups_have_rates_and_averages_of_their_own_and_go_on_to_the_bit(tmp_path):
    first = play(tmp_path / "run", START)
    resumed, straight = play(tmp_path / "run", 6), play(tmp_path / "straight", 6)
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(straight))
    assert {name: len(ema) for name, ema in straight.ema.items()} == {"generator": 1, "discriminator": 2}
    rows = read_metrics(tmp_path / "straight")
    assert [row["update_norm/discriminator"] > 0 for row in rows] == [False] * START + [True] * 4
    for row in rows:
        np.testing.assert_allclose(row["loss"], row["loss/generator"] + row["loss/discriminator"], rtol=1e-6)
    # It rests until then: neither weight decay nor Adam's count moves anything.
    chex.assert_trees_all_equal(jax.device_get(first.params["discriminator"]), initial()["discriminator"])
    assert all(not np.any(x) for x in jax.tree.leaves(jax.device_get(first.opt_state["discriminator"])))


def initial() -> dict:
    """The parameters before the first step."""
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        return jax.device_get(init_state(GROUPS, make_optimizers(GROUPS, 1), 0, mesh).params)


def test_frozen_weights_are_arguments():
    """They are no constants of the program: others give another loss through the same one."""
    optimizers = make_optimizers(GROUPS, 1)
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = init_state(GROUPS, optimizers, 0, mesh)
        batch = {name: x[None] for name, x in game_batch(0).items()}
        _, metrics = make_step(game, optimizers)(state, FROZEN, batch)
        other = init_state(GROUPS, optimizers, 0, mesh)
        _, doubled = make_step(game, optimizers)(other, {"scale": 2 * FROZEN["scale"]}, batch)
    np.testing.assert_allclose(doubled["loss/generator"], 2 * metrics["loss/generator"], rtol=1e-6)


def test_frozen_weights_of_the_host_are_copied_to_all_devices(tmp_path):
    config = LoopConfig(steps=2, log_every=1)
    job = game_job(frozen={"scale": np.asarray(FROZEN["scale"])})
    several = fit(job, config, 0, make_mesh(devices=jax.devices()[:4]), tmp_path, {}).params
    one = play(tmp_path / "one", 2).params
    chex.assert_trees_all_close(jax.device_get(several), jax.device_get(one), rtol=1e-5)


def test_a_mean_may_not_take_the_name_of_a_metric(tmp_path):
    def loss(*arguments):
        sums, (weights, _) = game(*arguments)
        return sums, (weights, {"loss/generator": (1.0, 1.0)})

    with pytest.raises(ValueError, match="loss/generator; these names are the training step's own"):
        play(tmp_path / "run", 1, loss=loss)


def test_a_batch_that_the_mesh_cannot_split_is_refused_before_a_folder_is_made(classified, tmp_path, capsys):
    options, _ = classified
    train = ["train", *options, f"--workdir={tmp_path / 'run'}"]
    assert run(*train, "--config.batch=7", "--config.loop.accumulate=2") == 2
    assert "batch is 7; it must be a positive multiple of loop.accumulate = 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_job_may_forbid_micro_batches(tmp_path):
    with pytest.raises(UserError, match=r"^loop.accumulate is 2; [^\n]* it must be 1$"):
        play(tmp_path, 2, accumulate=2, micro_batches=False)
    chex.assert_trees_all_close(
        jax.device_get(play(tmp_path / "two", 2, accumulate=2).params),
        jax.device_get(play(tmp_path / "one", 2).params),
        rtol=1e-5,
    )
