"""The command line: quick help with examples, and one sentence for every mistake."""

import argparse
import dataclasses
import errno
import inspect
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from fixtures_runs import ROOT, TINY, build_options, chain, one_device, run, train_options  # noqa: F401

from sora_jax import __version__, cli
from sora_jax.config import load
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.sources import SourceConfig
from sora_jax.data.storing.manifest import Dataset
from sora_jax.data.viewing import write
from sora_jax.generate import command
from sora_jax.generate.run import Run, load_run
from sora_jax.kinds import KINDS, dry_run, run_config
from sora_jax.nn import params
from sora_jax.parallel.compile import Topology
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.parsers import data as data_parser
from sora_jax.train.autoencoder import AutoencoderRun, StageConfig
from sora_jax.train.encode import EncodeOptions


def parsers(parser=None, name="sora-jax"):
    """(name, parser) of the command line and of every command and verb in it."""
    parser = parser or cli.make_parser()
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb, inner in action.choices.items():
                yield from parsers(inner, f"{name} {verb}")


PARSERS = dict(parsers())
VERSIONS = f"sora_jax {__version__}, JAX {jax.__version__}, Python {'.'.join(map(str, sys.version_info[:3]))}\n"


@pytest.mark.parametrize("name", PARSERS)
def test_every_help_has_an_example_that_parses(name):
    text = PARSERS[name].format_help()
    examples = re.findall(r"^  (sora-jax .+?)(?:   .*)?$", text, flags=re.M)
    assert any(example.startswith(name) for example in examples)
    for example in examples:
        arguments = [word.strip('"') for word in re.findall(r'(?:[^\s"]|"[^"]*")+', example)][1:]
        _, rest = cli.make_parser().parse_known_args(arguments)
        assert all(argument.startswith(tuple(cli.PREFIXES)) for argument in rest), rest
    for file in re.findall(r"--config=([\w/]+\.py)", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("name", PARSERS)
def test_every_option_is_explained(name):
    for action in PARSERS[name]._actions:
        if action.option_strings:
            assert action.help, action.option_strings


def shown_default(name: str, option: str) -> str | None:
    """Return the default that the help of a command shows for an option."""
    text = re.sub(r"\s+", " ", PARSERS[name].format_help().partition("options:")[2])
    about = re.search(rf" {option} (.*?)(?= --[a-z]| example)", text)[1]
    found = re.search(r"\(default: (.*)\)", about)
    return found and found[1]


def test_data_build_shows_the_defaults_of_its_config(tmp_path):
    """Each default is that of the config that the command makes when the option is not given."""
    name = "sora-jax data build"
    options = cli.parsed(["data", "build", f"--out={tmp_path}", f"--path={tmp_path}"])
    config = data_parser.build_config(options)
    assert config == BuildConfig(out=str(tmp_path), sources=(SourceConfig(path=str(tmp_path)),))
    values = vars(config) | {flag: vars(config.sources[0])[field] for flag, field in data_parser.SOURCE_FLAGS.items()}
    values |= {"world": "simple", "path": None}
    special = {"min_pixels": "(4 * multiple)^2", "split": "all", "label_field": "label"}
    special |= {"media_field": None, "caption_field": "caption, text or prompt"}
    shown = {a.dest: shown_default(name, a.option_strings[0]) for a in PARSERS[name]._actions if a.dest in values}
    assert {"workers", "max_frames", "holdout", "source", "strip_fps"} <= set(shown)
    for option, text in shown.items():
        value = None if option == "out" or isinstance(values[option], bool) else values[option]
        assert text == special.get(option, None if value is None else str(value)), option


def test_the_defaults_of_the_command_line_are_those_of_the_functions():
    def default(command, option):
        return PARSERS[f"sora-jax {command}"].get_default(option)

    encode, generate, plan, load = (
        {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
        for function in (EncodeOptions, Run.generate, Topology.parse, load_run)
    )
    assert [default("data encode", name) for name in ("batch", "shapes")] == [encode["batch"], encode["shapes"]]
    share, tiles = encode["share"], encode["tiles"]
    assert share.parse(default("data encode", "shard")) == share
    for name in ("data encode", "sample"):
        assert tiles.parse(default(name, "tile"), default(name, "tile_overlap")) == tiles == generate["tiles"]
    assert [default("sample", name) for name in ("seed", "negative")] == [generate["seed"], generate["negative"]]
    assert default("sample", "checkpoint") == load["checkpoint"]
    assert default("plan", "slices") == plan["slices"]


@pytest.mark.parametrize(
    "options, words",
    [
        (
            ["--config=configs/data.py:mixed", "--strip-frames=8"],
            "--strip-frames is 8; beside --config with 3 sources it must be a field of --config.sources[i]",
        ),
        (["--config.max_tokens=9"], "--config is not given; it must be the file that --config.max_tokens=9 changes"),
    ],
)
def test_a_build_of_one_source_or_of_a_config(tmp_path, capsys, options, words):
    assert words in refused(capsys, "data", "build", f"--out={tmp_path / 'out'}", *options)


def test_options_change_the_only_source_of_a_config():
    command = ["data", "build", "--config=configs/data.py:video", "--out=o", "--path=elsewhere", "--max-frames=9"]
    config = data_parser.build_config(cli.parsed([*command, "--config.sources[0].weight=2"]))
    (source,) = config.sources
    assert (source.name, source.path, source.weight) == ("folder", "elsewhere", 2)
    assert (config.max_frames, config.max_tokens) == (9, 320)
    other = data_parser.build_config(cli.parsed([*command[:-2], "--source=world", "--limit=5"]))
    assert (other.sources[0].name, other.sources[0].path, other.sources[0].limit) == ("world", "", 5)


def seconds(*arguments) -> float:
    """Return the processor's seconds of a Python process beyond its own start: other programs add nothing to them."""

    def once(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once(*arguments) for _ in range(3)) - min(once("-c", "pass") for _ in range(3))


def test_help_and_import_are_quick():
    assert seconds("-m", "sora_jax.cli", "--help") < 0.5
    assert seconds("-c", "import sora_jax") < 0.2


@pytest.mark.parametrize("module", ["sora_jax", "sora_jax.cli", "sora_jax.config"])
def test_nothing_heavy_is_imported_before_it_is_needed(module):
    heavy = "{'jax', 'numpy', 'flax', 'av', 'PIL', 'pyarrow', 'matplotlib', 'grain', 'ml_collections', 'orbax'}"
    program = f"import sys, {module}; print(*({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("words", [["sample"], ["sample", "--workdir=nothere", "--prompt=a"], ["doctor", "nothere"]])
def test_what_is_forgotten_is_refused_before_jax_is_imported(words):
    program = f"import sys; from sora_jax import cli; print(cli.main({words}), 'jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    assert found.stdout == "2 False\n" and found.stderr.count("\n") == 1, found.stderr


def refused(capsys, *arguments) -> str:
    """The one sentence on stderr, apart from what tells progress, of a command that ends with code 2."""
    capsys.readouterr()  # what was made for the test by now may have said something
    code = run(*arguments)
    captured = capsys.readouterr()
    assert code == 2, captured
    lines = [line for line in captured.err.splitlines() if "% " not in line and ": sampling " not in line]
    assert len(lines) == 1 and lines[0].startswith("sora-jax: "), captured.err
    return lines[0]


@pytest.mark.parametrize(
    "change, words",
    [
        ("optim.rate=1", ["config.optim.rate", "learning_rate"]),
        ("batch=many", ["config.batch", "many"]),
        ("batch=2.5", ["config.batch", "2.5"]),
        ("model.latent_channels=9", ["config.model.latent_channels is 9", "4"]),
        ("packing.length=8", ["packing.length is 8", "at least 18"]),
        ("batch=6", ["batch is 6", "loop.accumulate = 4"]),
        ("mesh.data=3", ["data=3", "1 devices"]),
        ("split=none", ["'none'", "held-out, train"]),
        ("latents=nowhere", ["nowhere", "data encode"]),
        ("preview.sizes=((8,16,16),)", ["frames is 8", "5 or 9"]),
        ("model.text.vocabulary=9", ["vocabulary is 9"]),
    ],
)
def test_a_wrong_config_is_refused_before_a_folder_is_made(chain, tmp_path, capsys, change, words):  # noqa: F811
    options = train_options("transformer", tmp_path / "run", f"latents={chain.latents}", "loop.accumulate=4", change)
    message = refused(capsys, *options)
    assert all(word in message for word in words), message
    assert refused(capsys, *options, "--dry-run") == message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        "depth=0",
        "width=0",
        "width=-384",
        "heads=0",
        "heads=-6",
        "latent_channels=0",
        "mlp_ratio=inf",
        "position_theta=-1.0",
        "text.width=-32",
        "text.width=33 model.text.head_width=11",
        "text.depth=0",
        "text.head_width=0",
        "text.pretrained_width=-1",
    ],
)
def test_a_dry_run_refuses_sizes_that_no_model_has(tmp_path, capsys, change):
    name, value = change.split()[0].split("=")
    options = train_options("transformer", tmp_path / "run", *f"model.{change}".split())
    assert f"{name} is {value}; it must" in refused(capsys, *options, "--dry-run")


@pytest.mark.parametrize(
    "change",
    [
        "times.mean=nan",
        "times.std=inf",
        "times.std=nan",
        "weight.gamma=inf",
        "weight.bias=nan",
        "weight.sigma_data=inf",
    ],
)
def test_a_dry_run_refuses_numbers_of_diffusion_that_are_not_finite(tmp_path, capsys, change):
    name, value = change.split("=")
    options = train_options("transformer", tmp_path / "run", f"diffusion.{change}")
    assert f"{name} is {value}; it must be finite" in refused(capsys, *options, "--dry-run")


@pytest.mark.parametrize(
    "change, words",
    [
        ("crop=(9,64,64)", ["9 x 64 x 64", "24"]),
        ("crop=(6,16,16)", ["frames is 6", "5 or 9"]),
        ("loop.accumulate=3", ["batch is 16", "loop.accumulate = 3"]),
        ("split=none", ["config.split is 'none'"]),
        ("model.time_factor=2", ["5 or 7"]),
        ("data=nowhere", ["nowhere", "data build"]),
    ],
)
def test_a_wrong_autoencoder_config_too(chain, tmp_path, capsys, change, words):  # noqa: F811
    dataset = [] if change.startswith("data=") else [f"data={chain.dataset}"]
    if "time_factor" in change:
        dataset += ["crop=(6,16,16)"]
    message = refused(capsys, *train_options("autoencoder", tmp_path / "run", *dataset, change))
    assert all(word in message for word in words), message
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_that_does_not_take_every_clip_is_refused_at_the_start(chain, tmp_path, capsys):  # noqa: F811
    finer = ["model.patch=(2,4)", "model.space_factor=16", "model.multipliers=(1,1,1)", "crop=(5,16,16)"]
    message = refused(capsys, *train_options("autoencoder", tmp_path / "run", f"data={chain.dataset}", *finer))
    assert "clips of 5 x 24 x 16" in message and "16 or 32" in message


def test_wrong_files_and_folders(chain, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    latents, encoder = f"latents={chain.latents}", f"--autoencoder={tmp_path}"
    cases = [
        (["train", "--config=none.py", "--workdir=x"], "there is no file 'none.py'"),
        (train_options("nonsense", tmp_path / "x"), "'nonsense'; allowed: 'autoencoder', 'transformer'"),
        (train_options("transformer", tmp_path / "x", "latents=nowhere"), "data encode"),
        (train_options("transformer", tmp_path / "occupied", latents), "take an empty folder"),
        (train_options("transformer", tmp_path / "file" / "run", latents), "file"),
        (train_options("transformer", chain.transformer, latents, "model.depth=3"), "another config.model.depth"),
        (["sample", f"--workdir={tmp_path / 'empty'}", "--prompt=a", "--out=a.gif"], "not a run folder"),
        (["sample", f"--workdir={chain.autoencoder}", "--prompt=a", "--out=a.gif"], "it must be 'denoiser'"),
        (["convert", "--to=dit", f"--workdir={chain.autoencoder}", "--out=x"], "it must be 'denoiser'"),
        (["data", "inspect", tmp_path / "empty"], "data build"),
        (["data", "encode", encoder, f"--data={chain.dataset}", "--out=x"], "no trained autoencoder"),
        (["data", "encode", f"--autoencoder={chain.autoencoder}", f"--data={tmp_path}", "--out=x"], "data build"),
        (["data", "encode", encoder, f"--data={tmp_path}", "--out=x", "--batch=0"], "--batch is 0"),
    ]
    for arguments, words in cases:
        message = refused(capsys, *arguments)
        assert words in message, (arguments, message)
    assert not Path("x").exists()


def test_wrong_sources(chain, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    shutil.copytree(chain.clips, tmp_path / "silent")
    (tmp_path / "silent" / "captions.csv").unlink()
    out = tmp_path / "dataset"
    assert "there are none" in refused(capsys, *build_options(tmp_path / "empty", out))
    assert "must be a folder of videos or pictures" in refused(capsys, *build_options(tmp_path / "none", out))
    assert "6 x no caption" in refused(capsys, *build_options(tmp_path / "silent", out), "--workers=1")
    assert "--max-frames=9, not 5" in refused(capsys, *build_options(chain.clips, chain.dataset), "--max-frames=5")
    assert "simple" in refused(capsys, "data", "build", "--source=world", "--world=flat", "--limit=2", f"--out={out}")
    said = refused(capsys, "data", "build", "--world=phyworld", "--limit=2", f"--out={out}")
    assert "--world is 'phyworld'; it must be left out but with --source=world" in said
    assert not out.exists()


@pytest.fixture
def no_loading(monkeypatch):
    def load(*_):
        raise AssertionError("loaded before the options were checked")

    monkeypatch.setattr(command, "load_run", load)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--prompt=a", "--out=clip.avi"], "must end in"),
        (["--prompt=a", "--out=clip"], "must end in"),
        (["--prompt=a", "--out=clip.png", "--frames=5"], "must end in"),
        (["--out=clip.gif"], "no prompt"),
        (["--out=clip.gif", "--prompts-file=none.txt"], "none.txt"),
        (["--out=clip.gif", f"--prompts-file={os.devnull}"], "devnull|no such file|no prompt"),
        (["--prompt=a", "--out=clip.gif", "--steps=0"], "steps .*0"),
        (["--prompt=a", "--out=clip.gif", "--solver=magic"], "solver"),
        (["--prompt=a", "--out=clip.gif", "--fps=0"], "--fps is 0"),
        (["--prompt=a", "--out=clip.gif", "--upscale=0"], "--upscale is 0"),
    ],
)
def test_samples_that_cannot_be_are_refused_before_anything_is_loaded(chain, capsys, no_loading, options, words):  # noqa: F811
    message = refused(capsys, "sample", f"--workdir={chain.transformer}", *options)
    assert re.search(words, message), message


def test_a_size_that_does_not_divide_says_which_do(chain, tmp_path, capsys):  # noqa: F811
    options = ["sample", f"--workdir={chain.transformer}", "--prompt=a", f"--out={tmp_path / 'a.gif'}"]
    assert "16 or 24" in refused(capsys, *options, "--width=20", "--height=16", "--frames=9")
    assert "5 or 9" in refused(capsys, *options, "--width=16", "--height=16", "--frames=7")


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_cannot_be_written(chain, tmp_path, capsys, monkeypatch, error):  # noqa: F811
    def full(*_):
        raise OSError(error, os.strerror(error), "thing")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        message = refused(capsys, *train_options("transformer", tmp_path / "run", f"latents={chain.latents}"))
    assert os.strerror(error) in message and "config.json" in message
    monkeypatch.setitem(write.WRITERS, ".gif", full)
    out = tmp_path / "new" / "clip.gif"
    options = ["--prompt=a red square", "--frames=5", "--height=16", "--width=24", "--steps=2", f"--out={out}"]
    assert os.strerror(error) in refused(capsys, "sample", f"--workdir={chain.transformer}", *options)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [["train"], ["sample", "--workdir=x", "--frames", "--out=a.gif"], ["data"], ["nonsense"], []],
)
def test_what_is_no_command_is_one_line_that_says_where_the_usage_is(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    command = " ".join(["sora-jax", *arguments[:1]]) if arguments[:1] != ["nonsense"] else "sora-jax"
    assert ended.value.code == 2
    assert re.fullmatch(rf"sora-jax: .*; see {command} --help\n", capsys.readouterr().err)


def test_a_mistyped_option_is_told_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "encode", "--autoencoder=a", "--data=b", "--out=c", "--bach=3"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == (
        "sora-jax: unrecognized arguments: --bach=3; did you mean --batch?; see sora-jax data encode --help\n"
    )


@pytest.mark.parametrize("words", [["a red circle"], ["a", "red", "circle"]])
def test_words_without_an_option_may_be_a_prompt(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", *words])
    assert 'did you mean --prompt="a red circle"?' in capsys.readouterr().err


def test_a_mistyped_option_that_is_required_is_told_with_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sora-jax", "train", "--wrkdir=x"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "required: --workdir; did you mean --workdir?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, said",
    [("--solver=eulr", "--solver is 'eulr'"), ("--steps=0", "--steps is '0'"), ("--height=17", "--height is 17")],
)
def test_options_of_sample_are_named_as_typed(chain, capsys, option, said):  # noqa: F811
    given = ["--frames=5", "--height=16", "--width=24"]
    words = [option, *(g for g in given if g.split("=")[0] != option.split("=")[0])]
    assert run("sample", f"--workdir={chain.transformer}", "--prompt=a red square", "--out=x.gif", *words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"sora-jax: {said}")


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == VERSIONS


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["trian"], "'trian' is not a command of sora-jax; allowed: quickstart, train, .*; did you mean train?"),
        (["data", "incode"], "'incode' is not a command of sora-jax data; .*; did you mean encode?"),
        (["dance"], "'dance' is not a command of sora-jax; allowed: [a-z, ]*; see sora-jax --help$"),
    ],
)
def test_a_mistyped_command_is_told_with_the_nearest(capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert re.search(said.replace("?", r"\?"), capsys.readouterr().err)


def test_help_and_version_are_commands_too(capsys):
    for arguments, wanted in ((["help"], PARSERS["sora-jax"]), (["help", "train"], PARSERS["sora-jax train"])):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0 and capsys.readouterr().out == wanted.format_help()
    with pytest.raises(SystemExit):
        cli.main(["version"])
    assert capsys.readouterr().out == VERSIONS


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "sora_jax", "version"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, VERSIONS)


@pytest.mark.parametrize("arguments", [["version"], ["completion", "bash"]])  # less and more than a pipe holds
def test_a_reader_that_ends_ends_the_command_without_a_word(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "sora_jax", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.NO_READER, "")


@pytest.mark.parametrize("words, changes", [
    (["--config.seed", "3"], ["seed=3"]),
    (["--config.optim.clip_norm", "-1"], ["optim.clip_norm=-1"]),
    (["--config.data", "a b", "--config.seed=4"], ["data=a b", "seed=4"]),
    (["--config.model.guides", "--config.seed", "5"], ["model.guides", "seed=5"]),
    (["--config.sources[0].path", "x=y"], ["sources[0].path=x=y"]),
])  # fmt: skip
def test_a_blank_works_as_an_equals_sign(words, changes):
    options = cli.parsed(["train", "--config", "c.py", *words, "--workdir=x"])
    assert options.changes == changes and options.config == "c.py"
    assert cli.parsed(["sample", "--sampling.guidance.scale", "2"]).sampling == ["guidance.scale=2"]


@pytest.mark.parametrize("arguments", [["--config.seed=3"], ["--colour=red"], ["--config.seed", "3"]])
def test_stray_arguments_are_not_swallowed(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "inspect", "x", *arguments])
    assert ended.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


def test_dry_run_prints_the_config_and_the_parameters_and_makes_nothing(tmp_path, capsys):
    assert run(*train_options("autoencoder", tmp_path / "run", "seed=41"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert '"seed": 41' in printed and re.search(r"total +[\d,]+", printed)
    assert printed.endswith("data: not checked, since --config.data is not given\n")
    assert not (tmp_path / "run").exists() and TINY.exists()


def figures(text: str) -> dict[str, float]:
    """Return the figures of a dry run by name; later ones of a name replace those before."""
    found = re.findall(r"^  (\w+) +([\d.,e+-]+)", text.partition("\nparameters\n")[2], re.MULTILINE)
    return {name: float(value.replace(",", "")) for name, value in found}


def test_a_dry_run_of_the_denoiser_tells_what_a_step_and_an_epoch_are(chain, tmp_path, capsys):  # noqa: F811
    options = train_options("transformer", tmp_path / "run", f"latents={chain.latents}", "loop.steps=10")
    capsys.readouterr()
    assert run(*options, "--dry-run") == 0
    printed = capsys.readouterr().out
    found = figures(printed)
    # Two clips of 18 tokens and three of 12 in packs of 48: two packs; a step has eight.
    assert found["epoch"] == 2 / 8 and "the run has 40.0 epochs" in printed
    assert found["tokens"] == 4 * (2 * 18 + 3 * 12) and "of 384 places: 25.0% padding" in printed
    groups = KINDS["denoiser"].groups(run_config(load(str(TINY))))
    parameters = params.count(groups["model"].specs)
    # Adam keeps two values for each parameter, and there are two averages.
    assert re.search(rf"^  total +{parameters:,}$", printed, re.MULTILINE)
    for name, copies in (("parameters", 1), ("optimizer", 2), ("averages", 2), ("total", 5)):
        np.testing.assert_allclose(found[name], copies * 4 * parameters / 2**20, atol=0.01)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_splits_the_memory_over_the_mesh(tmp_path):
    config = run_config(load(str(TINY), ["mesh.fsdp=4", "model.width=64", "mesh.data=2"]))
    whole = dataclasses.replace(config, mesh=MeshConfig(data=8))
    split, alone = (dry_run.describe(c, tmp_path / "run")["memory"]["bytes"] for c in (config, whole))
    assert split["total"] < 0.45 * alone["total"]


def test_a_dry_run_of_stages_reads_the_first(chain, tmp_path):  # noqa: F811
    model = run_config(load(f"{TINY}:autoencoder")).model
    stages = (StageConfig(steps=3, crop=(5, 16, 16)), StageConfig(steps=4))
    config = AutoencoderRun(data=str(chain.dataset), model=model, crop=(9, 16, 16), stages=stages)
    with one_device():
        found = dry_run.describe(config, tmp_path / "run")["data"]
    assert found["first_step"].items() >= {"clips": 16, "frames": 14 * 5 + 2}.items() and found["epoch_steps"] == 5 / 16
    assert not (tmp_path / "run").exists()


def test_the_world_may_be_built_without_a_share_that_is_held_out(tmp_path):
    command = ["data", "build", "--source=world", "--limit=3", "--multiple=8", f"--out={tmp_path / 'world'}"]
    assert run(*command) == 0
    rows = list(Dataset(tmp_path / "world").rows())
    assert [row["split"] for row in rows] == ["train"] * 3
    assert all(row["captions"] and row["captions"][0] for row in rows) and len({row["id"] for row in rows}) == 3
