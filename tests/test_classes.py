"""Pictures with classes, from files to a grid, by the commands; what guidance, classes and solvers do to samples."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from fixtures_runs import ROOT, chain, one_device, run  # noqa: F401
from PIL import Image

from sora_jax.data.building.inspect import inspect
from sora_jax.data.storing.latents import LatentCache
from sora_jax.data.viewing.sheets import grid
from sora_jax.errors import UserError
from sora_jax.generate.requests import Wanted, check_seed, plan_requests
from sora_jax.generate.run import load_run
from sora_jax.generate.run import read_run_config as load_config

IMAGES = ROOT / "configs" / "images.py"
SMALL = [
    "model.depth=2", "model.width=24", "model.heads=2", "model.classes=3", "packing.length=48", "packing.slots=4",
    "batch=2", "loop.steps=4", "optim.warmup_steps=1", "loop.save_every=2", "loop.log_every=1", "loop.preview_every=4",
    "preview.classes=(0,2)",
    "preview.sizes=((1,16,16),)", "preview.steps=2", "sampling.steps=3", "sampling.guidance.scale=2.0",
]  # fmt: skip


def train(latents, workdir, *changes) -> int:
    given = {change.split("=")[0] for change in changes}
    small = [change for change in SMALL if change.split("=")[0] not in given]
    changes = [f"--config.{change}" for change in (f"latents={latents}", *small, *changes)]
    return run("train", f"--config={IMAGES}:transformer", f"--workdir={workdir}", *changes)


@pytest.fixture(scope="module")
def latents(tmp_path_factory, chain):  # noqa: F811
    """Twelve pictures of three classes and two sizes, encoded."""
    folder = tmp_path_factory.mktemp("classes")
    pictures, rows = folder / "pictures", ["file,label"]
    pictures.mkdir()
    for number in range(12):
        size = (16, 24) if number % 2 else (16, 16)
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        rows.append(f"{number}.png,{['ant', 'bee', 'cat'][number % 3]}")
    (pictures / "captions.csv").write_text("\n".join(rows))
    build = ["data", "build", f"--path={pictures}", f"--out={folder / 'data'}", "--multiple=8", "--max-pixels=384"]
    assert run(*build, "--holdout=0.1") == 0
    made = folder / "latents"
    encode = ["data", "encode", f"--autoencoder={chain.autoencoder}", f"--data={folder / 'data'}", f"--out={made}"]
    assert run(*encode) == 0
    return made


@pytest.fixture(scope="module")
def trained(latents):
    """The run folder of a model trained on them."""
    assert train(latents, latents.parent / "run") == 0
    return latents.parent / "run"


def test_classes_travel_from_the_table_to_the_cache_and_previews_are_shown(latents, trained):
    cache = LatentCache(latents)
    assert sorted(set(cache.labels.tolist())) == [0, 1, 2] and len(cache) == 12
    assert (trained / "samples" / "step_000004" / "01.png").exists()


def test_a_model_of_classes_is_evaluated_by_the_labels_of_pictures(latents, trained, tmp_path, capsys):
    own = ["--own.widths=(8,)", "--own.size=16", "--own.features=3", "--own.steps=2", "--own.batch=4"]
    data = shutil.copytree(latents.parent / "data", tmp_path / "data")
    options = [f"--data={data}", "--split=train", "--steps=1", f"--out={tmp_path}", *own]
    capsys.readouterr()
    assert run("evaluate", trained, "--metrics=own,loss", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["clips"]
        == found["columns"]["generated"]["own"]["generated"]
        == len(LatentCache(latents).indices("train"))
    )
    (record,) = (tmp_path / "clips").glob("*/samples.json")
    labels = [request[5] for request in json.loads(record.read_text())["requests"]]
    assert sorted(set(labels)) == [0, 1, 2]
    assert run("evaluate", trained, "--metrics=consistency", *options[:-5]) == 2
    assert "it must be a run that is trained on captions" in capsys.readouterr().err


def test_inspect_says_which_class_has_which_number(latents):
    report = inspect(latents.parent / "data")
    assert report.summary["classes"] == {"0 ant": 4, "1 bee": 4, "2 cat": 4}
    assert "0 ant (4), 1 bee (4), 2 cat (4)" in report.text


def test_a_model_without_positions_in_time_makes_pictures_alone(model):
    assert model.latent_size(5, 16, 16)[0] > 1
    flat = dataclasses.replace(model.config.model, rotary=False, sincos_positions=True, sincos_axes="xy")
    flat = dataclasses.replace(model, config=dataclasses.replace(model.config, model=flat))
    assert flat.latent_size(1, 16, 16) == model.latent_size(1, 16, 16)
    with pytest.raises(UserError, match="frames is 5"):
        flat.latent_size(5, 16, 16)


def test_sample_writes_a_grid(trained, tmp_path, capsys):
    command = [
        "sample",
        f"--workdir={trained}",
        "--class=0,1,2",
        "--class=0,1",
        "--size=16",
        "--steps=2",
        "--guidance=1.5",
        "--upscale=1",
    ]
    assert run(*command) == 0
    found = trained / "samples" / "classes.png"
    assert capsys.readouterr().out.splitlines()[-1] == str(found)
    assert Image.open(found).size == (3 * 16 + 2 * 2, 2 * 16 + 2)
    other = [*command, "--solver=ddim", "--sampling.guidance.rescale=0.7", "--seed=1", f"--out={tmp_path / 'b.png'}"]
    assert run(*other) == 0 and (np.asarray(Image.open(found)) != np.asarray(Image.open(tmp_path / "b.png"))).any()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--class=0,x"], "--class is '0,x'"),
        (["--class=3"], "class is 3; it must be a whole number from 0 to 2"),
        (["--prompt=a cat"], "takes classes, not prompts"),
        (["--class=0", "--prompt=a cat"], "both given"),
        (["--class=0", "--size=16", "--width=24"], "beside --height or --width"),
        (["--class=0", "--size=17"], "multiple of 4"),
        (["--class=0", "--solver=magic"], "'magic'"),
        (["--class=0", "--steps=many"], "'many'"),
        (["--class=0", "--sampling.guidance.nonsense=1"], "there is no 'nonsense'"),
        (["--class=0", "--sampling.solver=heun"], "--sampling.solver is 'heun'; it is a group of options"),
        (["--class=0", "--sampling.guidance.channels=99"], "sampling.guidance.channels is 99"),
        (["--class=0", "--negative=blurred"], "reads no text"),
        (["--class=0", "--autoencoder=elsewhere"], "there is no trained autoencoder in that folder"),
    ],
)
def test_mistakes_are_told_in_one_sentence(trained, tmp_path, capsys, arguments, words):
    assert run("sample", f"--workdir={trained}", f"--out={tmp_path / 'x.png'}", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("label", [1.5, 1.0, True, np.bool_(True), "a", None, -1])
def test_what_is_no_class_is_refused_in_a_sentence(model, label):
    with pytest.raises(UserError) as error:
        model.generate(sizes=SIZE, classes=[label])
    assert str(error.value) == f"class is {label!r}; it must be a whole number from 0 to 2"


def test_clips_seeds_and_prompts_of_other_types_are_refused(model):
    for options, words in (
        (dict(clip_ids=[1.5]), r"clip_ids is \[1.5\]; each must be a whole number"),
        (dict(seed=1.5), "seed is 1.5; it must be a whole number"),
        (dict(prompts="a"), "this run takes classes, not prompts"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate(sizes=SIZE, **dict(classes=[1]) | options)
    wanted = Wanted(classes=np.array([2, 0]), sizes=SIZE)
    requests = plan_requests(model.config, model.autoencoder.config, wanted, model.config.sampling)
    assert [request.label for request in requests] == [2, 0]
    check_seed(np.int64(3))


@pytest.mark.parametrize(
    "change", ["preview.classes=(0,3)", "preview.steps=abc", "preview.classes=() preview.prompts=('a',)"]
)
def test_previews_that_cannot_be_are_refused_before_the_first_step(latents, tmp_path, capsys, change):
    assert train(latents, tmp_path / "run", *change.split()) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_run_of_an_earlier_version_samples_and_goes_on(trained, latents, tmp_path):
    """Its previews had a guidance of their own and a number of steps, and later fields were not there."""
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    config = json.loads((old / "config.json").read_text())
    del config["sampling"], config["model"]["learned_variance"]
    config["preview"] |= {"guidance": 2.5, "steps": 2}
    (old / "config.json").write_text(json.dumps(config))
    assert load_config(old).sampling.guidance.scale == 2.5 and load_config(old).preview.steps == "2"
    assert train(latents, old, "loop.steps=5") == 0
    assert run("sample", f"--workdir={old}", "--class=0", "--steps=2") == 0


def test_clips_without_the_classes_of_the_model_are_refused(chain, latents, tmp_path, capsys):  # noqa: F811
    assert train(chain.latents, tmp_path / "a") == 2
    assert "no class" in capsys.readouterr().err
    assert train(latents, tmp_path / "b", "model.classes=2", "preview.classes=(0,1)") == 2
    assert "config.model.classes is 2" in capsys.readouterr().err


@pytest.fixture(scope="module")
def model(trained, randomised):
    """The loaded run with random parameters: after four steps the gates have hardly opened."""
    with one_device():
        loaded = load_run(trained)
    from sora_jax.models.transformer import denoiser_specs

    return dataclasses.replace(loaded, params=randomised(denoiser_specs(loaded.config.model), scale=0.2))


SIZE = (1, 16, 16)


def test_pictures_of_several_scales_and_classes_together_are_those_alone(model):
    with one_device():
        together = model.generate(sizes=SIZE, classes=[0, 1, 2], guidance=[1.0, 4.0, 0.5], clip_ids=[5, 6, 7])
        for place, (label, scale) in enumerate([(0, 1.0), (1, 4.0), (2, 0.5)]):
            (alone,) = model.generate(sizes=SIZE, classes=[label], guidance=scale, clip_ids=[5 + place])
            assert np.abs(alone.astype(int) - together[place]).max() <= 1
        (other,) = model.generate(sizes=SIZE, classes=[1], guidance=1.0, clip_ids=[6])
        assert (other != together[1]).any()
        with pytest.raises(UserError, match="2 values of guidance for 3"):
            model.generate(sizes=SIZE, classes=[0, 1, 2], guidance=[1.0, 2.0])


@pytest.mark.parametrize("solver", ["euler_sde", "ddpm"])
def test_solvers_that_draw_are_keyed_by_clip_and_seed(model, solver):
    def pictures(*clips, seed=0):
        with one_device():
            made = model.generate(
                sizes=SIZE, classes=[1] * len(clips), clip_ids=clips, solver=solver, steps=3, seed=seed, guidance=1.0
            )
        return [picture.astype(int) for picture in made]

    first, second = pictures(8, 9)
    assert np.abs(first - second).max() > 5
    np.testing.assert_allclose(pictures(9)[0], second, atol=1)
    assert np.abs(pictures(9, seed=1)[0] - second).max() > 5


def test_a_grid_holds_every_clip_in_its_place():
    clips = [np.full((2, 3, 4, 3), 10 * number, np.uint8) for number in range(5)]
    whole = grid(clips)
    assert whole.shape == (2, 2 * 3 + 2, 3 * 4 + 2 * 2, 3)
    for number, clip in enumerate(clips):
        row, column = divmod(number, 3)
        np.testing.assert_array_equal(whole[:, 5 * row : 5 * row + 3, 6 * column : 6 * column + 4], clip)
    assert (whole[:, 5:, 12:] == 255).all() and grid(clips[:1]).shape == (2, 3, 4, 3)
