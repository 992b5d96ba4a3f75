"""The loop around the step: reports, stops, and what is kept when a step goes wrong."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
import signal
import struct
import time
import types

import chex
import jax
import numpy as np
import pytest
from fixtures_runs import chain  # noqa: F401
from fixtures_toy import GROUPS, OPTIM, toy_job, train
from tensorboardX.proto import event_pb2

from sora_jax.data.feeding import tokenizer as tokenizers
from sora_jax.data.feeding.pipeline import PackedBatches
from sora_jax.data.storing.latents import LatentCache
from sora_jax.errors import Stopped, UserError
from sora_jax.generate.run import read_run_config
from sora_jax.models.denoiser import train_flops
from sora_jax.parallel.mesh import make_mesh
from sora_jax.train import loop
from sora_jax.train import reporter as reporters
from sora_jax.train.checkpoint import Checkpoints
from sora_jax.train.loop import LoopConfig, Measure
from sora_jax.train.metrics import MetricsWriter, Stopwatch, read_metrics
from sora_jax.train.reporter import Instruments, MetricAccumulator, Reporter, due
from sora_jax.train.state import MODEL, init_state, make_optimizers
from sora_jax.train.watchdog import Watchdog, spent_before


def newest(workdir):
    mesh = make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(init_state(GROUPS, make_optimizers(GROUPS, 1), 1, mesh))
    return jax.device_get(state)


def test_due():
    assert [step for step in range(1, 11) if due(step, 4, 10)] == [4, 8, 10]
    assert [step for step in range(1, 11) if due(step, 0, 10)] == [10]


NAN = {"x": np.full((2, 4), np.nan, np.float32)}
STEEP = {"root": np.zeros(2, np.float32)}


@pytest.mark.parametrize("bad, what", [(NAN, "loss"), (STEEP, "parameter norm")])
def test_a_step_that_is_not_finite_stops_the_run_and_the_last_good_save_stays(tmp_path, bad, what):
    with pytest.raises(
        UserError, match=rf"the {what} of step 5 is nan; clips of that batch: \[104, 204\]; .* of step 4; the same .*$"
    ):
        train(tmp_path, toy_job({5: lambda: bad}), save_every=1)
    state = newest(tmp_path)
    assert int(state.step) == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 5, 10])
def test_a_signal_ends_the_step_saves_and_the_run_goes_on_as_if_nothing_had_been(tmp_path, number, step):
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        train(tmp_path / "stopped", toy_job({step: lambda: os.kill(os.getpid(), number)}))
    assert stopped.value.step == step == int(newest(tmp_path / "stopped").step)
    assert signal.getsignal(number) is before
    resumed, straight = train(tmp_path / "stopped"), train(tmp_path / "straight")
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(straight))
    rows, wanted = read_metrics(tmp_path / "stopped"), read_metrics(tmp_path / "straight")
    assert [(row["step"], row["loss"]) for row in rows] == [(row["step"], row["loss"]) for row in wanted]


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, toy_job({5: twice}))
    assert int(newest(tmp_path).step) == 4


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_when_there_is_room(tmp_path, monkeypatch):
    room = iter([10**9, 10**9, 10])
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=next(room)))
        with pytest.raises(UserError, match=r"^the disk of [^\n]* has 0 MB left; a checkpoint needs [^\n]*$"):
            train(tmp_path / "run")
    assert int(newest(tmp_path / "run").step) == 4
    resumed, straight = train(tmp_path / "run"), train(tmp_path / "straight")
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(straight))


def test_no_step_is_reported_twice(tmp_path):
    train(tmp_path, steps=6, save_every=3)
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    # What a run leaves that is killed after step 9, with its newest checkpoint at step 6.
    late = [row | {"step": step, "loss": 77.0} for step, row in zip((7, 8, 9), rows)]
    path.write_text("\n".join(map(json.dumps, rows + late)) + '\n{"step": 10, "lo')
    train(tmp_path, steps=12)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, 13))
    assert found[:6] == rows and all(row["loss"] != 77.0 for row in found)


def test_the_best_checkpoints_are_those_of_the_best_reports(tmp_path):
    train(tmp_path, steps=10, keep=1, keep_best=2)
    losses = {row["step"]: row["loss"] for row in read_metrics(tmp_path) if row["step"] % 2 == 0}
    best = sorted(losses, key=losses.get)[:2]
    folders = folders_of(tmp_path)
    assert folders == {*best, 10} and len(folders) == 3
    with pytest.raises(UserError, match=r"^loop.best_metric is 'beauty'; this run reports [^\n]*gradient_norm"):
        train(tmp_path / "other", keep_best=1, best_metric="beauty")
    with pytest.raises(UserError, match=r"loop.log_every must be positive"):
        LoopConfig(keep_best=1, log_every=0)


def test_a_checkpoint_that_was_not_measured_is_not_the_best(tmp_path):
    """Step 3 is measured as the best one, and 4 is the next save: its weights are others."""
    losses = {3: 1.0, 6: 2.0, 9: 3.0, 10: 4.0}
    job = dataclasses.replace(toy_job(), measure=Measure(3, lambda step, averages: {"held_out/loss": losses[step]}))
    options = {"keep": 1, "keep_best": 2, "best_metric": "held_out/loss"}
    train(tmp_path / "a", job, steps=10, **options)  # saves at 2, 4, 6, 8, 10: two of them are measured
    assert folders_of(tmp_path / "a") == {6, 10}
    train(tmp_path / "b", job, steps=9, log_every=4, save_every=1, **options)  # 4 and 5, without a report, neither
    assert folders_of(tmp_path / "b") == {3, 6, 9}
    with Checkpoints(tmp_path / "b" / "checkpoints") as checkpoints:
        assert checkpoints.candidates("best")[0] == 3


def folders_of(run) -> set[int]:
    return {int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdigit()}


def test_previews_see_the_average_after_each_reported_step(tmp_path):
    seen = []

    def preview(step, averages, writer):
        seen.append((step, len(read_metrics(tmp_path)), np.array(averages[MODEL]["weight"])))

    state = train(tmp_path, toy_job(preview=preview), preview_every=4)
    assert [entry[:2] for entry in seen] == [(4, 4), (8, 8), (10, 10)]
    np.testing.assert_array_equal(seen[-1][2], state.ema[MODEL][0]["weight"])


def test_rates_and_seconds(tmp_path):
    train(tmp_path, steps=9, log_every=4)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 9]
    for row in rows:
        np.testing.assert_allclose(row["tokens_per_second"] / row["clips_per_second"], 3)
        np.testing.assert_allclose(row["padding_share"], 1 / 4)
        assert {"seconds/init", "seconds/compile", "seconds/data"} <= row.keys()
    totals = [sum(value for name, value in row.items() if name.startswith("seconds/")) for row in rows]
    assert totals == sorted(totals)


def test_rates_leave_out_previews_and_saves(monkeypatch):
    """One second a step of six tokens is six tokens a second, whatever comes between the steps."""
    now, reports = [0.0], []
    monkeypatch.setattr(reporters.time, "perf_counter", lambda: now[0])
    writer = types.SimpleNamespace(write=lambda step, row: reports.append(row))
    bar = types.SimpleNamespace(update=lambda n: None, set_postfix_str=lambda text: None, disable=True)
    watch = Stopwatch()
    instruments = Instruments(writer, bar, watch, int, int)
    reporter = Reporter(toy_job(), LoopConfig(steps=12, log_every=2), instruments, MetricAccumulator(), {})
    for step in range(1, 13):
        now[0] += 1
        reporter.hold(step, {"loss": float(step), "parameter_norm": 1.0}, {"x": (0, 0)})
        reporter.read_previous()
        if step % 3 == 0:
            with watch("save"):
                now[0] += 50
    assert [row["tokens_per_second"] for row in reports] == [6.0] * 6
    assert [row["loss"] for row in reports] == [1.5, 3.5, 5.5, 7.5, 9.5, 11.5]


def test_the_rate_of_the_bar_is_of_the_steps_after_the_one_that_compiles():
    from tqdm import tqdm

    bar = tqdm(total=10, initial=4, file=io.StringIO(), postfix="compiling the step", mininterval=0)
    bar.start_t -= 100  # a minute and a half of compilation
    for step in (5, 6):
        reporters._advance(bar, first=step == 5)
        assert bar.n == step
    assert bar.format_dict["elapsed"] < 50 and bar.format_dict["initial"] == 5 and "compiling" not in bar.postfix


def test_what_was_done_after_the_save_that_a_run_goes_on_from_is_lost(tmp_path, capsys):
    train(tmp_path, steps=6, save_every=3)
    kept = json.loads((tmp_path / "time.json").read_text())
    assert kept["step"] == 6
    (tmp_path / "time.json").write_text(json.dumps(kept | {"step": 8, "seconds": kept["seconds"] | {"data": 1000.0}}))
    train(tmp_path, steps=12)
    seconds = json.loads((tmp_path / "time.json").read_text())["seconds"]
    assert 999 < seconds["lost"] < 1010 and seconds["data"] < 100
    assert read_metrics(tmp_path)[-1]["seconds/lost"] == seconds["lost"]
    train(tmp_path, steps=20)  # that one ended in order: no more is lost
    after = json.loads((tmp_path / "time.json").read_text())["seconds"]
    assert after["lost"] == seconds["lost"] and after["step"] > seconds["step"]
    said = capsys.readouterr().out.splitlines()
    assert "toy: goes on from step 12 of 20" in said
    assert said[-1].startswith("toy: step 20 of 20; ") and f"lost {seconds['lost']:.1f} s" in said[-1]


@pytest.mark.parametrize("left", ["", "{}", "[]", '{"step": 4, "seconds": {"data": "much"}}', "null"])
def test_a_book_of_times_that_a_power_cut_left_keeps_no_run_from_going_on(tmp_path, capfd, left):
    (tmp_path / "time.json").write_text(left)
    saved = {"step": 3.0}
    assert spent_before(tmp_path, 5, saved) == saved
    assert "time.json cannot be read" in capfd.readouterr().err


def test_a_step_that_hangs_is_reported_while_it_hangs(capfd):
    watch = Stopwatch()

    def step(number, pause):
        with watch("data"):
            time.sleep(pause)
        dog.stepped(number)

    with Watchdog(watch, None, 0, interval=0.05) as dog:
        for number in range(1, 12):
            step(number, 0.02)
        with watch("save"):
            time.sleep(0.6)  # no step
        step(12, 0.02)
        assert "sora-jax" not in capfd.readouterr().err
        with watch("data"):
            time.sleep(0.9)
            said = capfd.readouterr().err
        dog.stepped(13)
    assert said.count("sora-jax: step 13 has taken 0.") == 1 and "it waits for its batch" in said
    assert "sora-jax: step 13 took 0." in capfd.readouterr().err


def test_nothing_is_carried_to_the_device_unasked(tmp_path):
    job = dataclasses.replace(toy_job(), to_device=jax.device_get)  # a slip: the step is given host arrays
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(tmp_path, job)


def test_spikes_are_skipped_and_counted_also_over_a_restart(tmp_path):
    far = {"x": np.full((2, 4), 1e4, np.float32)}
    at = dict.fromkeys((120, 130), lambda: far)
    optim = dataclasses.replace(OPTIM, skip_spikes=3.0)
    state = train(tmp_path / "whole", toy_job(at, optim=optim), steps=140, save_every=125, log_every=20)
    train(tmp_path / "parts", toy_job(at, optim=optim), steps=125, log_every=20, save_every=0)
    parts = train(tmp_path / "parts", toy_job(at, optim=optim), steps=140, log_every=20, save_every=0)
    chex.assert_trees_all_equal(jax.device_get(parts), jax.device_get(state))
    skipped = {row["step"]: row["skipped_updates"] for row in read_metrics(tmp_path / "parts")}
    assert skipped[100] == 0 and skipped[120] >= 1 and skipped[140] >= skipped[120] + 1
    assert np.abs(state.params[MODEL]["weight"]).max() < 10


def test_means_go_on_after_a_stop():
    rows = [{"loss": np.float32(x), "bins": np.array([x, np.nan if x > 2 else 1.0])} for x in (1, 2, 3, 4)]
    whole, first = MetricAccumulator(), MetricAccumulator()
    for row in rows[:3]:
        first.add(row)
    second = MetricAccumulator(json.loads(json.dumps(first.state())))
    second.add(rows[3])
    for row in rows:
        whole.add(row)
    expected = whole.take()
    assert expected["loss"] == 2.5 and expected["bins"].tolist() == [2.5, 1.0]
    found = second.take()
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert second.state() == {}


def test_a_vector_is_written_entry_by_entry_and_what_is_not_finite_as_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"a": np.array([1.0, np.nan]), "b": 2})
    assert read_metrics(tmp_path) == [{"step": 3, "a/0": 1.0, "a/1": None, "b": 2.0}]
    events = list((tmp_path / "tensorboard").glob("events*"))
    assert len(events) == 1 and events[0].stat().st_size > 0


def shown(folder) -> dict[str, list[int]]:
    """The steps of each scalar that TensorBoard shows: a session that starts at a step drops what is there from it on.

    tensorboard/backend/event_processing/event_accumulator.py, `_CheckForRestartAndMaybePurge`.
    """
    steps: dict[str, list[int]] = {}
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)  # then 4 bytes of its sum, the event, and 4 of its own sum
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            if event.session_log.status == event_pb2.SessionLog.START:
                steps = {tag: [step for step in kept if step < event.step] for tag, kept in steps.items()}
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return steps


def test_tensorboard_shows_each_step_once_also_of_a_run_killed_before_its_first_save(tmp_path):
    def die():
        raise RuntimeError

    for session, (job, save_every) in enumerate([({8: die}, 100), ({7: die}, 3), ({}, 3)]):
        with contextlib.suppress(RuntimeError):
            train(tmp_path, toy_job(job), steps=12, save_every=save_every)
        (events,) = (tmp_path / "tensorboard").glob("events*")
        events.rename(events.with_name(f"session-{session}"))  # files of one second would have one name
    assert shown(tmp_path)["loss"] == [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 13))


def test_the_report_of_a_denoiser_is_of_its_batches(chain):  # noqa: F811
    config, cache = read_run_config(chain.transformer), LatentCache(chain.latents)
    tokenizer = tokenizers.load(chain.transformer / "tokenizer.json")
    batches = PackedBatches(cache, tokenizer, config.packs, config.batch, config.seed, config.split)
    rows = read_metrics(chain.transformer)
    for row in rows[1:]:
        tokens = batches[row["step"] - 1]["grids_BS3"].prod(-1).sum()
        np.testing.assert_allclose(row["padding_share"], 1 - tokens / (config.batch * config.packing.length))
        clips = (batches[row["step"] - 1]["clip_ids_BS"] > 0).sum()
        np.testing.assert_allclose(row["tokens_per_second"] / row["clips_per_second"], tokens / clips, rtol=1e-6)
        flops = train_flops(config.model, batches[row["step"] - 1])
        np.testing.assert_allclose(row["flops_per_second"] / row["clips_per_second"], flops / clips, rtol=1e-6)
    names = {"loss", "gradient_norm", "update_norm", "parameter_norm", *(f"loss_by_noise/{i}" for i in range(10))}
    assert all(names <= row.keys() for row in rows)


def test_seconds_aside_are_left_out_of_the_rate_of_the_bar(monkeypatch):
    now = iter([100.0, 130.0])
    monkeypatch.setattr(loop.time, "time", lambda: next(now))
    bar = types.SimpleNamespace(disable=False, last_print_t=99.0)
    with loop._aside(bar):
        pass
    assert bar.last_print_t == 129.0
