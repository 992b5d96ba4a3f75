"""Check what lists options: the help with a config, `configs`, the reference page, completion."""

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from typing import Literal

import pytest
from fixtures_runs import ROOT

from sora_jax import cli, errors
from sora_jax.benchmarks.phyworld import PhyworldBench
from sora_jax.config import load, to_dict
from sora_jax.data.building import beam, recaption
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.reading import cuts
from sora_jax.data.sources import SourceConfig
from sora_jax.diffusion.process import PROCESSES
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SOLVERS, SolverConfig
from sora_jax.diffusion.spacing import SPACINGS
from sora_jax.evaluate.suite import METRICS
from sora_jax.field_docs import describe, groups, reachable, summary
from sora_jax.generate import expand
from sora_jax.kinds import KINDS
from sora_jax.models import pretrained
from sora_jax.parsers.completion import SHELLS, script
from sora_jax.parsers.configs import list_configs
from sora_jax.parsers.fields import read_config
from sora_jax.quickstart import QuickstartConfig
from sora_jax.train.denoiser import DenoiserRun, DiffusionConfig
from sora_jax.worlds import WorldConfig
from sora_jax.worlds.captions import MOTIONS

ROOTS = (*(kind.config for kind in KINDS.values()), QuickstartConfig, PhyworldBench, BuildConfig, SamplingConfig)
CONFIGS = ("tiny.py", "tiny.py:autoencoder", "dit.py:S/2", "quickstart.py", "phyworld.py", "data.py")


OF_METRICS = [type(metric.options) for metric in METRICS.values() if metric.options is not None]


@pytest.mark.parametrize("cls", [*reachable(*ROOTS), *OF_METRICS], ids=lambda cls: cls.__name__)
def test_every_field_has_a_line_of_documentation(cls):
    found = {field.name: field.about for field in describe(cls)}
    assert list(found) == [field.name for field in dataclasses.fields(cls)]
    for name, about in found.items():
        assert 8 <= len(about) <= 330 and "\n" not in about, (name, about)


@dataclasses.dataclass(frozen=True)
class Base:
    """Hold what another class inherits. This sentence is not in the summary."""

    batch: int = 8  # rows of a step
    seed: int = 0
    """Seed of all draws."""


@dataclasses.dataclass(frozen=True)
class Styles(Base):
    """Write documentation in all styles."""

    batch: int = 4
    # Two lines of comment,
    # which stand above.
    above: tuple[int, ...] = ()
    long: dict = dataclasses.field(  # not this comment
        default_factory=dict
    )  # behind the last line
    # For the reader of the code.
    below: Literal["a", 2] = "a"
    """a string wins"""
    formatted: float | None = None  # fmt: skip
    group: Base | None = None


def test_documentation_is_read_in_each_style():
    found = {field.name: (field.kind, field.about) for field in describe(Styles)}
    assert found == {
        "batch": ("int", "rows of a step"),
        "seed": ("int", "Seed of all draws"),
        "above": ("(int, ...)", "Two lines of comment, which stand above"),
        "long": ("dict", "behind the last line"),
        "below": ("a, 2", "a string wins"),
        "formatted": ("float or None", ""),
        "group": ("group or None", "Hold what another class inherits"),
    }
    assert summary("Do it (Ma et al. 2401.08740, 3.5). Then\nmore.") == "Do it (Ma et al. 2401.08740, 3.5)"


@pytest.mark.parametrize(
    "cls, name, words",
    [
        (SolverConfig, "name", SOLVERS),
        (SamplingConfig, "spacing", SPACINGS),
        (DiffusionConfig, "process", PROCESSES),
        (BuildConfig, "place", ("start", "middle", "random")),
        (WorldConfig, "motions", MOTIONS),
    ],
)
def test_the_words_that_a_field_takes_are_listed(cls, name, words):
    """They are known in `__post_init__` alone: the config itself is asked for them."""
    (kind,) = [field.kind for field in describe(cls) if field.name == name]
    assert kind.removeprefix("some of ") == ", ".join(words)


def help_of(capsys, monkeypatch, *arguments: str, columns: int = 400) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def leaves(values, path: str = ""):
    """Paths of the values of a plain config; groups in tuples have the index of their entry."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaves(value, f"{path}.{name}" if path else name)
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for i, value in enumerate(values):
            yield from leaves(value, f"{path}[{i}]")
    else:
        yield path


@pytest.mark.parametrize("file", CONFIGS)
def test_help_lists_the_fields_of_a_config_as_they_can_be_typed(capsys, monkeypatch, file):
    """All fields are there; given back as options, what is listed changes nothing."""
    others = {"quickstart.py": ["quickstart"], "phyworld.py": ["bench", "phyworld"], "data.py": ["data", "build"]}
    command = others.get(file, ["train"])
    text = help_of(capsys, monkeypatch, *command, f"--config=configs/{file}")
    listed = re.findall(r"^  --config\.(\S+?)=(.*?)(?:  .*)?$", text, re.MULTILINE)
    config = read_config(f"configs/{file}")
    assert sorted(path for path, _ in listed) == sorted(leaves(to_dict(config)))
    changes = [f"{path}={value}" for path, value in listed if not value.endswith("...")]
    assert len(changes) > 0.9 * len(listed)
    assert read_config(f"configs/{file}", changes) == config


def test_help_shows_a_change_its_default_and_fits_the_terminal(capsys, monkeypatch):
    options = ["train", "--workdir=x", "--config", "configs/tiny.py", "--config.model.depth", "7"]
    text = help_of(capsys, monkeypatch, *options, columns=80)
    assert re.search(r"--config\.model\.depth=7 +number of blocks \(int; default: 12\)", text)
    fields = text[text.index("\n--config:") :].splitlines()
    assert max(len(line) for line in fields if not line.startswith("--config")) <= 80
    plan = help_of(capsys, monkeypatch, "plan", "--config=configs/tiny.py", "--config.model.depth=7", columns=80)
    assert plan.splitlines()[-len(fields) + 1 :] == fields[1:]


def test_help_of_sample_lists_the_fields_of_the_run(capsys, monkeypatch, tmp_path):
    sampling = SamplingConfig(spacing="karras")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(DenoiserRun(sampling=sampling))))
    text = help_of(capsys, monkeypatch, "sample", f"--workdir={tmp_path}")
    assert "--sampling.spacing=karras " in text and "--sampling.solver.name=euler " in text
    assert "--sampling." not in help_of(capsys, monkeypatch, "sample").partition("\n--sampling")[2]


def test_defaults_are_those_of_the_whole_config():
    """A group inside a config may have other defaults than alone."""
    config = DenoiserRun()
    rows = {group.path: dict((f.name, f.default) for f, _ in group.fields) for group in groups(config, "c", "", config)}
    assert rows["c.sampling.guidance"]["scale"] == 3.0 != SamplingConfig().guidance.scale


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["train", "--config=configs/tiny.py", "--workdir=x", "--steps=9"], "--config.loop.steps or "),
        (["train", "--config=configs/tiny.py", "--workdir=x", "--lerning-rate=1"], "--config.optim.learning_rate?"),
        (["quickstart", "--evaluate=4"], "--config.evaluate?"),
        (["train", "--workdir=x", "--finsh"], "--finish?"),
        (["trian"], "train?"),
        (["data", "biuld"], "build?"),
    ],
)
def test_what_was_meant_is_named(capsys, arguments, meant):
    assert f"; did you mean {meant}" in refusal(capsys, *arguments)


def test_a_number_that_is_none_is_refused_in_the_form_of_all(capsys):
    assert cli.main(["data", "build", "--out=x", "--max-frames=many"]) == 2
    assert capsys.readouterr().err == "sora-jax: --max-frames is 'many'; it must be a whole number\n"


def test_configs_lists_what_came_with_the_package(capsys):
    """No config is run for the list, and nothing heavy is imported."""
    program = "import sys; from sora_jax import cli; cli.main(['configs', '--json']); assert 'jax' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd="/", capture_output=True, text=True)
    listed = json.loads(done.stdout)
    assert done.stderr == "" and [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("*.py"))] == [
        entry["file"] for entry in listed
    ]
    assert cli.main(["configs"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for entry in listed:
        assert entry["file"] in text and ", ".join(filter(None, entry["variants"])) in text


@pytest.mark.parametrize("name", ["tiny", "tiny.py", "configs/tiny.py", "configs/tiny.py:autoencoder"])
def test_configs_shows_what_a_file_says_of_itself(capsys, name):
    assert cli.main(["configs", name]) == 0
    whole = ast.get_docstring(ast.parse((ROOT / "configs" / "tiny.py").read_text()))
    assert capsys.readouterr().out == f"{whole}\n\nvariants: transformer, autoencoder\n"


def test_an_unknown_config_is_refused_with_those_there_are(capsys):
    assert cli.main(["configs", "vidoe"]) == 2
    assert "did you mean configs/video.py?" in capsys.readouterr().err


@pytest.mark.parametrize("entry", list_configs(), ids=lambda entry: entry["file"])
def test_the_first_variant_is_the_default(entry):
    file, first = entry["file"], entry["variants"][0]
    assert load(file).to_dict() == load(f"{file}:{first}" if first else file).to_dict()


def test_the_reference_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_options", ROOT / "docs" / "make_options.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.page() == made.PAGE.read_text(encoding="utf-8"), "run: python docs/make_options.py"


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_prints_a_script_of_the_shell(shell):
    pytest.importorskip("shtab")
    text = script(cli.make_parser(), shell)
    assert "quickstart" in text and "init-from" in text
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_completion_without_a_shell_names_the_shells(capsys):
    assert cli.main(["completion"]) == 2
    assert capsys.readouterr().err == "sora-jax: SHELL is not given; it must be bash, zsh, fish or tcsh\n"


@pytest.mark.parametrize(
    "line, completed",
    [("sora-jax tra", "train"), ("sora-jax train --init", "--init-from"), ("sora-jax data insp", "inspect")],
)
def test_completion_completes_commands_and_options(line, completed):
    pytest.importorskip("shtab")
    words = line.split()
    ask = (
        f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}\n"
        f"_shtab_sora_jax sora-jax {words[-1]} {words[-2]}; echo ${{COMPREPLY[@]}}"
    )
    text = f"{script(cli.make_parser(), 'bash')}\n{ask}"
    done = subprocess.run(["bash", "--norc"], input=text, capture_output=True, text=True)
    assert done.stdout.split() == [completed], done.stderr


REQUIRES = ["jax>=0.10", 'gcsfs>=2026.10; extra == "gcs"', 'torch>=2.6; extra == "text"', "x>=1; extra == 'text'"]


@pytest.mark.parametrize("extra, packages", [("gcs", "'gcsfs>=2026.10'"), ("text", "'torch>=2.6' 'x>=1'")])
def test_a_hint_names_a_command_that_works(monkeypatch, tmp_path, extra, packages):
    assert errors.install_command(extra) == f"pip install -e '{ROOT}[{extra}]'"  # a checkout
    monkeypatch.setattr(errors, "CHECKOUT", tmp_path)
    monkeypatch.setattr(errors.importlib.metadata, "requires", lambda name: REQUIRES)
    assert errors.install_command(extra) == f"pip install {packages}"

    def absent(name):
        raise errors.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(errors.importlib.metadata, "requires", absent)  # a folder that was copied
    assert f"extra '{extra}'" in errors.install_command(extra)


@pytest.mark.parametrize(
    "module, extra, use",
    [
        ("scenedetect", "scenes", lambda: cuts.cut_moments([])),
        ("apache_beam", "beam", lambda: beam.build_with_beam(BuildConfig(sources=(SourceConfig(path="x"),)), "")),
        ("transformers", "text", lambda: recaption._captioner("transformers:any")),
        ("transformers", "text", lambda: expand._language_model("any")),
        ("torch", "text", pretrained._library),
    ],
)
def test_a_missing_library_is_told_with_the_command_that_installs_it(monkeypatch, module, extra, use):
    """The sixth, gcsfs, is in tests/test_storage.py."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(errors.UserError) as caught:
        use()
    assert str(caught.value).endswith(errors.install_command(extra))


def test_hints_name_extras_that_exist():
    """Each call of `install_command` is for an extra of setup.cfg, and no message names a package of an index."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "sora_jax").rglob("*.py")}
    asked = [name for text in texts.values() for name in re.findall(r"install_command\([\"'](\w+)", text)]
    extras = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    assert len(asked) >= 5 and set(asked) <= set(re.findall(r"^([\w-]+) =$", extras, re.MULTILINE))
    assert not any("sora_jax[" in text for text in texts.values())
