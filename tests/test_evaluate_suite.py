"""The table of metrics: what is asked for is measured or refused at once, losses are those of training, clips kept."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
from fixtures_caches import INFO, clip_row, write_cache
from fixtures_runs import chain, one_device, run, train_options, trained, with_random_weights  # noqa: F401
from PIL import Image

from sora_jax import cli
from sora_jax.data.storing.manifest import Dataset
from sora_jax.errors import UserError
from sora_jax.evaluate import evaluation
from sora_jax.evaluate.features import FeaturesConfig
from sora_jax.evaluate.frechet_report import FrechetOptions, frechet_report
from sora_jax.evaluate.loss import standard_error
from sora_jax.evaluate.samples import KeptClips, sample_kept
from sora_jax.evaluate.suite import METRICS, parse_metrics
from sora_jax.generate import run as runs
from sora_jax.generate import sampler
from sora_jax.generate.requests import Request
from sora_jax.parsers.evaluate import FIELDS
from sora_jax.train.held_out import ClipLosses
from sora_jax.train.metrics import read_metrics


def report_of(capsys, *command) -> dict:
    capsys.readouterr()
    assert run("evaluate", *command, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_loss_by_command_is_that_of_the_training(chain, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "run"
    changes = [f"latents={chain.latents}", "loop.steps=2", "loop.save_every=1", "held_out.every=1", "held_out.levels=2"]
    assert run(*train_options("transformer", folder, *changes)) == 0
    first, last = [row for row in read_metrics(folder) if "held_out/loss" in row]
    found = report_of(capsys, folder, "--metrics=loss")
    loss = found["columns"]["model"]["loss"]
    np.testing.assert_allclose(loss["loss"], last["held_out/loss"], rtol=1e-5)
    sizes = {name.rpartition("/")[2]: value for name, value in last.items() if name.startswith("held_out/by_size/")}
    assert loss["by_size"] == pytest.approx(sizes, rel=1e-5)
    bins = [value for name, value in last.items() if name.startswith("held_out/by_noise")]
    known = [value for value in loss["by_noise"] if value is not None]
    np.testing.assert_allclose(known, [value for value in bins if value is not None and np.isfinite(value)], rtol=1e-5)
    assert found["step"] == 2 and found["data"] is None and found["metrics"] == ["loss"] and loss["levels"] == 2
    assert np.asarray(Image.open(folder / "evaluation" / "loss.png")).std() > 5
    earlier = report_of(capsys, folder, "--metrics=loss", "--checkpoint=1")
    assert earlier["step"] == 1
    np.testing.assert_allclose(earlier["columns"]["model"]["loss"]["loss"], first["held_out/loss"], rtol=1e-5)


def test_a_split_and_another_cache_are_measured_alike(chain, tmp_path, capsys):  # noqa: F811
    options = ["--metrics=loss,likelihood", f"--out={tmp_path}", "--likelihood.steps=1", "--likelihood.method=heun"]
    found = report_of(capsys, chain.transformer, *options, "--split=train", "--count=4", "--loss.levels=2")
    loss, likelihood = (found["columns"]["model"][name] for name in ("loss", "likelihood"))
    assert loss["clips"] == likelihood["clips"] == 4 and loss["levels"] == 2 and likelihood["steps"] == 1
    assert "4 of 5 train clips" in found["about"]["loss"]
    command = ["evaluate", chain.transformer, *options, "--split=train", "--count=4", f"--latents={chain.latents}"]
    assert run(*command) == 0
    text = capsys.readouterr().out
    assert "1 steps of heun from noise level 0.001, 1 probe of each clip" in text
    wanted = f"{likelihood['bits_per_dimension']:.4f} ± {likelihood['standard_error']:.4f}"
    assert re.search(rf"^likelihood +bits per dimension +{wanted}$", text, re.MULTILINE)


@pytest.fixture
def no_loading(monkeypatch):
    """Weights must not be read."""

    def load(*_, **__):
        raise AssertionError("the weights were read")

    monkeypatch.setattr(evaluation, "load_run", load)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--metrics=fdv"], "--metrics is 'fdv'; allowed: 'oracle', 'consistency', 'loss'"),
        (["--metrics=loss,oracle"], "--data is not given; it must be a dataset folder"),
        (["--metrics=oracle", "--data={dataset}"], "the captions are not in the words of the embedded world"),
        (["--metrics=loss", "--latents=nowhere"], "--latents is 'nowhere'; there is no complete latent cache"),
        (["--metrics=loss", "--latents={other}"], "was made by another autoencoder"),
        (["--metrics=loss", "--split=vali"], "'vali'"),
        (["--metrics=loss", "--loss.levels=-1"], "--loss.levels is -1; it must be at least 1, or 0"),
        (["--metrics=likelihood", "--likelihood.method=euler"], "--likelihood.method is 'euler'; allowed: 'heun'"),
        (["--metrics=likelihood", "--likelihood.first=0"], "--likelihood.first is 0.0; it must be above 0"),
        (["--metrics=fvd", "--data={dataset}", "--split=train", "--fvd.weights={file}"], "the shortest clip has 5"),
        (["--metrics=fvd", "--data={dataset}", "--fvd.protocol=latte"], "--fvd.protocol is 'latte'; allowed: "),
        (["--metrics=fvd", "--data={dataset}", "--fvd.weights=no"], "--fvd.weights is 'no'; there is no such file"),
        (["--metrics=fid", "--data={dataset}"], "--fid.inception is not given"),
        (["--metrics=own", "--data={dataset}"], "--count chooses 1 clip; a Frechet distance needs at least 2"),
        (["--data={dataset}", "--likelihood.steps=9"], "--likelihood.steps=9 is given; it is for --metrics=likelihood"),
        (["--data={dataset}", "--sampling.spacing=odd"], "--sampling.spacing is 'odd'"),
    ],
)
def test_what_cannot_be_had_is_refused_before_the_weights_are_read(chain, tmp_path, capsys, no_loading, options, words):  # noqa: F811
    other = tmp_path / "other"
    if any("{other}" in option for option in options):
        write_cache(other, [clip_row(0, (1, 4, 4))], dataclasses.replace(INFO, fingerprint="another"))
    options = [option.format(dataset=chain.dataset, other=other, file=__file__) for option in options]
    assert run("evaluate", chain.transformer, *options, f"--out={tmp_path}") == 2
    assert words in capsys.readouterr().err


def test_a_distance_is_that_of_the_kept_clips(chain, tmp_path, capsys):  # noqa: F811
    dataset = shutil.copytree(chain.dataset, tmp_path / "dataset")  # which keeps the network
    small = ["--own.widths=(8,)", "--own.size=16", "--own.features=3", "--own.steps=2", "--own.batch=5"]
    options = [f"--data={dataset}", f"--out={tmp_path}", "--metrics=own,consistency", "--steps=1", "--split=train"]
    found = report_of(capsys, chain.transformer, *options, *small)
    assert list(found["columns"]["generated"]) == ["own", "clips", "looks"] and found["clips"] == 5
    (folder,) = (tmp_path / "clips").iterdir()
    kept, data = KeptClips(folder, 5), Dataset(dataset)
    real = sorted((clip.frames for clip in (data[row["index"]] for row in data.rows("train"))), key=np.shape)
    config = FeaturesConfig(widths=(8,), size=16, features=3, steps=2, batch=5)
    wanted = frechet_report("own", real, kept, FrechetOptions(data=dataset, own=config))
    for column, value in (("generated", wanted.value), ("autoencoder", None)):
        own = found["columns"][column]["own"]
        assert own["generated"] == 5 and own["value"] >= 0 and "precision" in own
        np.testing.assert_allclose(own["value"], own["value"] if value is None else value, rtol=1e-3)
    assert found["about"]["own"].startswith("5 real and 5 generated clips; ")


def test_all_leaves_out_what_cannot_be_had_and_says_why(chain, tmp_path, capsys):  # noqa: F811
    options = [f"--out={tmp_path}", "--likelihood.steps=1", "--metrics=all", "--split=train"]
    found = report_of(capsys, chain.transformer, *options)
    assert found["metrics"] == ["loss", "likelihood"]
    said = "\n".join(found["notes"])
    assert "oracle is left out: --data is not given" in said and "consistency is left out: --data is not given" in said


def test_the_table_and_the_parser_name_the_same_metrics():
    assert FIELDS == tuple(name for name, metric in METRICS.items() if metric.options is not None)
    about = cli.parsed(["evaluate", "RUN"]).parser._option_string_actions["--metrics"].help
    assert set(METRICS) <= set(re.findall(r"\w+", about))
    assert parse_metrics("loss, loss") == ("loss",) and parse_metrics(None) == ()


def test_the_standard_error_of_equal_clips_is_that_of_a_mean():
    rng = np.random.default_rng(0)
    loss, weight = rng.gamma(3.0, size=(2, 50, 4))
    found = ClipLosses(loss, np.full_like(loss, 3.0), loss)
    np.testing.assert_allclose(standard_error(found), (loss.mean(1) / 3).std(ddof=1) / np.sqrt(50))
    assert standard_error(ClipLosses(*np.ones((3, 1, 4)))) is None
    # Of unequal ones it is the spread over sets of clips.
    means = []
    for seed in range(400):
        chosen = np.random.default_rng(seed).integers(0, 50, 50)
        means.append(loss[chosen].sum() / weight[chosen].sum())
    np.testing.assert_allclose(standard_error(ClipLosses(loss, weight, loss)), np.std(means), rtol=0.15)


REQUESTS = [Request(f"a red square {n}", (1 + n % 2, 4, 4 + 2 * (n % 2)), n + 1, guidance=2.0) for n in range(6)]


@pytest.fixture(scope="module")
def model(trained):  # noqa: F811
    return with_random_weights(trained)


@pytest.fixture
def batches_of_one_pack(monkeypatch):
    monkeypatch.setattr(sampler, "PACKS_AT_ONCE", 1)


def kept(model, folder, seed=0, steps="1", requests=REQUESTS) -> KeptClips:
    with one_device():
        return sample_kept(model, requests, dataclasses.replace(model.config.sampling, steps=steps), seed, folder)


class Interrupted(BaseException):
    """Ctrl-C."""


def test_sampling_goes_on_where_it_was_interrupted_and_makes_the_same(
    model, tmp_path, monkeypatch, batches_of_one_pack
):
    whole = kept(model, tmp_path / "whole")
    solves, keep = [], KeptClips.keep

    def interrupted(clips, number, clip):
        if len(clips.kept) == 2:
            raise Interrupted
        keep(clips, number, clip)

    def counted(*arguments, **options):
        solves.append(arguments)
        return solve(*arguments, **options)

    solve = sampler.solve_packs
    monkeypatch.setattr(sampler, "solve_packs", counted)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(KeptClips, "keep", interrupted)
        kept(model, tmp_path / "cut")
    (folder,) = (tmp_path / "cut").iterdir()
    assert len(list(folder.glob("[0-9]*.npz"))) == 2
    first = len(solves)
    again = kept(model, tmp_path / "cut")
    assert 0 < len(solves) - first < len(REQUESTS)  # not all batches
    for mine, other in zip(again, whole, strict=True):
        np.testing.assert_array_equal(mine, other)
    solves.clear()
    kept(model, tmp_path / "cut")  # for a second metric
    assert not solves


def test_clips_of_other_weights_or_settings_are_never_taken(model, tmp_path):
    few = REQUESTS[:2]
    first = kept(model, tmp_path, requests=few)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: 1.01 * x, model.params))
    changed = [
        kept(other, tmp_path, requests=few),  # of the same step
        kept(dataclasses.replace(model, step=model.step + 1), tmp_path, requests=few),
        kept(model, tmp_path, seed=1, requests=few),
        kept(model, tmp_path, steps="2", requests=few),
        kept(model, tmp_path, requests=[dataclasses.replace(few[0], guidance=1.0), few[1]]),
    ]
    assert len({clips.folder for clips in (first, *changed)}) == 6
    assert (changed[0][0] != first[0]).any() and (changed[2][0] != first[0]).any()


def test_a_damaged_clip_is_told(tmp_path):
    clips = KeptClips(tmp_path, 2)
    clips.keep(1, np.zeros((1, 2, 2, 3), np.uint8))
    assert clips.kept == {1} and clips[1].shape == (1, 2, 2, 3)
    (tmp_path / "00001.npz").write_bytes(b"PK\x03\x04 half of a file")
    with pytest.raises(UserError, match="00001.npz' is damaged: .*; remove it, and it is sampled again"):
        clips[1]
    with pytest.raises(IndexError):
        clips[2]


def test_a_second_metric_reuses_the_clips_of_the_first(chain, tmp_path, monkeypatch, capsys):  # noqa: F811
    options = [f"--data={chain.dataset}", "--steps=1", f"--out={tmp_path}", "--metrics=consistency"]
    first = report_of(capsys, chain.transformer, *options)
    monkeypatch.setattr(sampler, "solve_packs", None)
    assert report_of(capsys, chain.transformer, *options)["columns"] == first["columns"]
    monkeypatch.setattr(runs.Run, "stream", lambda *_, **__: iter(()))
    with pytest.raises(UserError, match="damaged"):  # nothing was sampled, and nothing of another seed was taken
        evaluation.Evaluation(
            chain.transformer, chain.dataset, evaluation.DenoiserOptions(steps="1", seed=1)
        ).generated[0]
