"""A run goes on with other settings: what may change, what is carried over, and what the run folder remembers."""

import dataclasses
import functools
import json
import shutil

import chex
import jax
import numpy as np
import pytest
from fixtures_runs import TINY, chain, one_device, run, train_options  # noqa: F401
from fixtures_toy import SPECS, toy_job

from sora_jax.config import to_dict
from sora_jax.errors import UserError
from sora_jax.generate.run import load_run
from sora_jax.kinds.begin import given_config
from sora_jax.kinds.run import check_workdir
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train.adapt import InitConfig
from sora_jax.train.history import read_history
from sora_jax.train.loop import LoopConfig, fit
from sora_jax.train.metrics import read_metrics
from sora_jax.train.optim import OptimConfig, SpikeState, learning_rate
from sora_jax.train.run_config import RunConfig
from sora_jax.train.state import MODEL, Group

OPTIM = OptimConfig(0.1, warmup_steps=0, clip_norm=0.0, ema=(0.9, 0.5))
LOOP = LoopConfig(steps=10, log_every=1, save_every=0)


def read_saved(values):
    """The config and the groups of a checkpoint of `go`."""
    optim = OptimConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in values["optim"].items()})
    return values, {MODEL: Group(SPECS, optim)}


def go(workdir, optim=OPTIM, loop=LOOP, job=None, **fields):
    """Train the toy to `loop.steps`, as a run of this config would; job: what happens at a step, see `toy_job`."""
    workdir.mkdir(exist_ok=True)
    config = to_dict(RunConfig(kind="toy", optim=optim, loop=loop, **fields))
    job, mesh = toy_job(job, optim=optim), make_mesh(devices=jax.devices()[:1])
    return jax.device_get(fit(job, loop, 0, mesh, workdir, config, read_saved))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run of ten steps."""
    workdir = tmp_path_factory.mktemp("runs") / "half"
    go(workdir)
    return workdir


@pytest.fixture
def on(half, tmp_path):
    """Let a copy of the run go on to step 20."""
    workdir = tmp_path / "run"
    shutil.copytree(half, workdir)
    return workdir, functools.partial(go, workdir, loop=dataclasses.replace(LOOP, steps=20))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return go(tmp_path_factory.mktemp("runs") / "straight", loop=dataclasses.replace(LOOP, steps=20))


@pytest.mark.parametrize("change", [{"clip_norm": 1e9}, {"skip_spikes": 1e9}, {"clip_norm": 1e9, "skip_spikes": 1e9}])
def test_settings_that_change_nothing_change_nothing(on, straight, change):
    """Clipping and spikes add states to the optimizer; Adam's moments and the schedule must find their places."""
    _, go_on = on
    state = go_on(dataclasses.replace(OPTIM, **change))
    chex.assert_trees_all_close(state.params, straight.params, rtol=1e-6)
    chex.assert_trees_all_close(state.ema, straight.ema, rtol=1e-6)
    assert isinstance(state.opt_state[MODEL], SpikeState) == ("skip_spikes" in change)


def test_a_run_that_goes_on_unchanged_is_the_straight_one_to_the_bit(on, straight):
    workdir, go_on = on
    chex.assert_trees_all_equal(go_on(), straight)
    assert [line["step"] for line in read_history(workdir)] == [0, 10]  # it was made longer
    assert read_history(workdir)[1]["changed"] == {"loop.steps": [10, 20]}


def test_averages_follow_their_decay_and_new_ones_begin_as_the_nearest(on, straight):
    _, go_on = on
    state = go_on(dataclasses.replace(OPTIM, ema=(0.5, 0.9, 0.0)))
    chex.assert_trees_all_close(state.ema[MODEL][0], straight.ema[MODEL][1], rtol=1e-6)
    chex.assert_trees_all_close(state.ema[MODEL][1], straight.ema[MODEL][0], rtol=1e-6)
    chex.assert_trees_all_equal(state.ema[MODEL][2], state.params[MODEL])


def test_a_lower_rate_takes_smaller_steps_and_is_told(on, capsys):
    workdir, go_on = on
    go_on(dataclasses.replace(OPTIM, learning_rate=1e-3))
    said = capsys.readouterr().out
    assert "goes on from step 10 of 20 with config.optim.learning_rate 0.001 (was 0.1)" in said
    assert "the learning rate is" not in said  # once is enough
    rows = read_metrics(workdir)
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.1] * 10 + [1e-3] * 10)
    assert rows[10]["update_norm"] < 0.02 * rows[9]["update_norm"]


def test_a_finished_cosine_that_is_made_longer_leaps_and_says_so(tmp_path, capsys):
    optim = dataclasses.replace(OPTIM, schedule="cosine")
    go(tmp_path / "run", optim)
    go(tmp_path / "run", optim, dataclasses.replace(LOOP, steps=20))
    assert "the learning rate is 0.05 from here on, not 0" in capsys.readouterr().out


def test_a_start_that_trains_nothing_is_remembered_and_says_where_it_is(half, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(half, workdir)
    go(workdir, loop=dataclasses.replace(LOOP, steps=8, log_every=2))
    said = capsys.readouterr().out
    assert "already at step 10 beyond config.loop.steps = 8; with config.loop.steps 8 (was 10)" in said
    assert read_history(workdir)[-1]["changed"] == {"loop.steps": [10, 8], "loop.log_every": [1, 2]}


def test_reports_carry_the_rate_of_their_step(tmp_path):
    optim = dataclasses.replace(OPTIM, schedule="cosine", warmup_steps=4, decay_steps=10, skip_spikes=3.0)
    go(tmp_path / "run", optim)
    wanted = [float(learning_rate(optim)(step)) for step in range(10)]
    assert [row["learning_rate"] for row in read_metrics(tmp_path / "run")] == pytest.approx(wanted)


def test_the_history_forgets_what_was_lost(on):
    workdir, go_on = on
    slow = dataclasses.replace(OPTIM, learning_rate=1e-3)
    go_on(slow)
    shutil.rmtree(workdir / "checkpoints" / "20")
    go_on(dataclasses.replace(OPTIM, learning_rate=1e-2))
    lines = read_history(workdir)
    assert [line["step"] for line in lines] == [0, 10]
    assert lines[1]["changed"]["optim.learning_rate"] == [0.1, 0.01]
    assert lines[1]["config"]["optim"]["learning_rate"] == 0.01


def test_a_batch_that_ends_a_run_is_skipped_when_asked(tmp_path):
    """The way out that the message offers: the bad batch changes nothing, the rest goes on."""
    bad = {step: lambda: {"x": np.full((2, 4), np.nan, np.float32)} for step in (5, 6)}
    train = functools.partial(go, tmp_path / "run", loop=dataclasses.replace(LOOP, save_every=1))
    with pytest.raises(UserError, match=r"the loss of step 5 is nan; .* --config\.optim\.skip_spikes=3"):
        train(job=bad)
    state = train(dataclasses.replace(OPTIM, skip_spikes=3.0), job=bad)
    assert int(state.step) == 10 and int(state.opt_state[MODEL].skipped_updates) == 2
    assert np.isfinite(state.params[MODEL]["weight"]).all()
    rows = read_metrics(tmp_path / "run")
    assert [row["loss"] is None for row in rows] == [step in (5, 6) for step in range(1, 11)]


def test_losses_that_are_never_finite_end_a_run_that_skips_them(tmp_path):
    bad = dict.fromkeys(range(3, 20), lambda: {"x": np.full((2, 4), np.nan, np.float32)})
    with pytest.raises(UserError, match="the loss of step 12 is nan; .*so were the 9 before it, all skipped"):
        go(tmp_path / "run", dataclasses.replace(OPTIM, skip_spikes=3.0), dataclasses.replace(LOOP, steps=20), job=bad)


FREE = [
    "optim.learning_rate=1e-4",
    "optim.skip_spikes=3.0",
    "batch=16",
    "loop.accumulate=2",
    "seed=1",
    "packing.slots=3",
    "captions=any",
    "diffusion.caption_dropout=0.2",
    "diffusion.times.distribution=uniform",
    "diffusion.weight.name=uniform",
    "model.remat=none",
    "sampling.steps=4",
]
BOUND = {"model.depth=3": "model.depth", "optim.method=sgd": "optim.method", "split=all": "split"}
BOUND |= {"diffusion.prediction=eps": "diffusion.prediction", "tokenizer.max_tokens=8": "tokenizer.max_tokens"}


def test_what_weights_mean_stays_and_the_rest_is_free(chain):  # noqa: F811
    workdir = chain.transformer
    with_changes = lambda *changes: given_config(None, changes, workdir, InitConfig(), ())  # noqa: E731
    check_workdir(workdir, with_changes(*FREE))
    for change, field in BOUND.items():
        with pytest.raises(UserError, match=rf"another config\.{field}, .*--init-from={workdir}"):
            check_workdir(workdir, with_changes(change))


def test_a_run_goes_on_by_its_folder_alone_with_all_that_may_change(chain, tmp_path, capsys):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(chain.transformer, workdir)
    before = (workdir / "metrics.jsonl").read_text()
    changes = [f"--config.{c}" for c in (*FREE, "loop.steps=8", "loop.preview_every=0", "preview.prompts=()")]
    assert run("train", f"--workdir={workdir}", *changes) == 0
    assert "goes on from step 6 of 8 with " in capsys.readouterr().out
    rows = read_metrics(workdir)
    assert (workdir / "metrics.jsonl").read_text().startswith(before)
    assert rows[-1]["step"] == 8 and np.isfinite(rows[-1]["loss"])
    assert json.loads((workdir / "config.json").read_text())["batch"] == 16
    assert [line["config"]["batch"] for line in read_history(workdir)] == [8, 16]


def test_a_checkpoint_from_before_an_average_was_added_is_still_read(chain, tmp_path):  # noqa: F811
    workdir = tmp_path / "run"
    shutil.copytree(chain.transformer, workdir)
    config = json.loads((workdir / "config.json").read_text())
    config["optim"]["ema"] = [0.9, 0.5, 0.99]  # as a run that goes on writes it, before its next save
    (workdir / "config.json").write_text(json.dumps(config))
    with one_device():
        found, wanted = (load_run(folder) for folder in (workdir, chain.transformer))
    chex.assert_trees_all_equal(found.params, wanted.params)


def test_what_a_run_began_with_need_not_be_told_again_and_cannot_change_unsaid(chain, tmp_path, capsys):  # noqa: F811
    workdir, source, tiny = tmp_path / "run", str(chain.transformer), f"{TINY}:transformer"
    workdir.mkdir()
    began = given_config(tiny, ["lora.rank=2"], workdir, InitConfig(source), ())
    (workdir / "config.json").write_text(json.dumps(to_dict(began)))
    again = given_config(tiny, ["seed=4"], workdir, InitConfig(), ())
    assert again == dataclasses.replace(began, seed=4)
    for change, field in {"lora.rank=3": "lora.rank", "init.renew=('head',)": "init.renew"}.items():
        given = [change, f"init.weights={source}"] if "init" in change else [change]
        other = given_config(tiny, given, workdir, InitConfig(), ())
        with pytest.raises(UserError, match=rf"another config\.{field}"):
            check_workdir(workdir, other)


def test_a_schedule_that_ends_before_its_warm_up_is_refused(chain, tmp_path, capsys):  # noqa: F811
    optim = ["optim.schedule=cosine", "optim.warmup_steps=10", "optim.decay_steps=6"]
    options = train_options("transformer", tmp_path / "run", f"latents={chain.latents}", "loop.steps=12", *optim)
    assert run(*options) == 2
    assert "--config.optim.warmup_steps is 10; it must be below optim.decay_steps = 6" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    changes = ["optim.schedule=cosine", "optim.warmup_steps=10", "loop.steps=8"]
    assert run(*train_options("transformer", tmp_path / "run", *changes), "--dry-run") == 0
    assert "warmup_steps is 10 and the run has 8 steps: the rate does not reach its peak" in capsys.readouterr().out
