"""The pages say what is so: commands parse, configs load, names, links and tables exist, CI runs the README's line."""

import argparse
import ast
import dataclasses
import importlib
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
import typing
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest
from fixtures_runs import chain, one_device  # noqa: F401
from packaging.requirements import Requirement

import sora_jax
from sora_jax import cli
from sora_jax.benchmarks.phyworld import PhyworldBench
from sora_jax.config import OneOf, from_dict, load, override
from sora_jax.data.building.prepare import BuildConfig
from sora_jax.data.viewing.write import write_video
from sora_jax.diffusion.prediction import FORMS
from sora_jax.diffusion.process import PROCESSES
from sora_jax.diffusion.sampling import SamplingConfig
from sora_jax.diffusion.solvers import SOLVERS
from sora_jax.diffusion.spacing import SPACINGS
from sora_jax.diffusion.times import QUANTILES
from sora_jax.diffusion.weights import WEIGHTS
from sora_jax.evaluate.suite import METRICS
from sora_jax.generate.run import load_run
from sora_jax.kinds import KINDS, run_config
from sora_jax.nn.attention import BACKENDS, SEQUENCES
from sora_jax.nn.remat import REMAT
from sora_jax.parallel.mesh import MeshConfig
from sora_jax.parsers.bench import moving_mnist, phyworld
from sora_jax.parsers.data import build
from sora_jax.quickstart import QuickstartConfig

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci" / "run"
QUICKSTART = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/sora-jax quickstart"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n 2"
README_BYTES = 12_000
OTHERS = {"--jaxtyping-packages", "--runner", "--select"}  # options of pytest, Beam and ruff


def text(file: str) -> str:
    return (ROOT / file).read_text(encoding="utf-8")


def docstring(path: Path) -> str:
    found = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    return re.sub(r"\\\n *", "", found)


FILES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PAGES = {file: text(file) for file in FILES}
README = PAGES["README.md"]
LINKED = [*FILES, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "experiments").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)\n *```$", re.MULTILINE | re.DOTALL)
BLOCKS = [(file, kind, block) for file in LINKED for kind, block in BLOCK.findall(text(file))]
SHELL = [(file, block.replace("\\\n", " ")) for file, kind, block in BLOCKS if kind == ""]
CONFIGS = [*(ROOT / "configs").glob("*.py"), *(ROOT / "experiments").glob("*/config.py")]
# Of the docstring of a config: indented lines, with a remark behind two blanks or none.
NAMED = [line for path in CONFIGS for line in re.findall(r"^ +(sora-jax .*?)(?:  .*)?$", docstring(path), re.MULTILINE)]
LINES = [line.strip() for _, block in SHELL for line in block.splitlines()] + NAMED
COMMANDS = sorted({line for line in LINES if re.match(r"\S*sora-jax |.*&& \S*sora-jax |[A-Z_]+=\S+ sora-jax ", line)})
SCRIPTS = sorted({line for line in LINES if re.match(r"(\S+/)?python3? \S+\.py", line)})
INSTALLS = sorted({found for line in LINES for found in re.findall(r"(?:^|/|&& |[(; ])pip (install [^&|#]+)", line)})
TOOLS = r"\S+/(python|pytest|ruff|mypy|lint-imports|sphinx-build|jupyter)( |$)"
OTHER_LINES = rf"python3 -m venv|apt-get|export|for|mkdir|\. \.venv|\.ci/|git |{TOOLS}"
PYTHON = [(file, i, block) for i, (file, kind, block) in enumerate(BLOCKS) if kind == "python"]
OF_EXTRAS = {"gradio", "playwright", "torch"}
EXECUTED = sorted({file for file, _, _ in PYTHON} - {"docs/sampling.md"})  # its runs are of other kinds: names alone
BLOCK_KINDS = {"": "shell", "python": "executed, or its names checked", "text": "neither run nor checked"}


def section(file: str, heading: str) -> str:
    """Return the text below a heading, up to the next heading of any level."""
    return PAGES[file].split(f"## {heading}\n")[1].split("\n## ")[0]


def spans(file: str) -> list[str]:
    """Return what a page sets in backticks outside blocks of code."""
    return re.findall(r"`([^`\n]+)`", BLOCK.sub("", PAGES[file]))


def test_the_readme_is_a_door_and_not_the_house():
    assert len(README.encode()) <= README_BYTES


def test_the_two_lines_stand_at_the_top():
    assert [block for file, block in SHELL if file == "README.md"][:2] == [QUICKSTART, TESTS]
    assert README.startswith("# sora_jax\n")
    assert len(README[: README.index(TESTS)].splitlines()) < 25


def test_ci_runs_the_line_that_the_readme_prints():
    script = CI.read_text(encoding="utf-8")
    assert os.access(CI, os.X_OK)
    assert TESTS not in script
    statement = re.search(r"^line=.*$", script, re.MULTILINE).group()
    found = subprocess.run(["bash", "-c", f'{statement}; printf %s "$line"'], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == TESTS
    assert re.search(r'^part .*bash -c "\$line"$', script, re.MULTILINE)
    assert re.search(r"^rm -rf \.venv$", script, re.MULTILINE)


def test_no_command_is_overlooked():
    shown = [line for line in LINES if "sora-jax" in line]
    assert set(shown) == set(COMMANDS) and len(COMMANDS) > 30


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)  # where the pages say that commands are given
    words = shlex.split(command.rpartition("&&")[2].replace("=gs://", "=/"))  # what reads gs:// is an extra
    words = words[[Path(word).name for word in words].index("sora-jax") + 1 :]
    if "--help" in words:
        with pytest.raises(SystemExit) as shown:
            cli.parsed(words)
        assert not shown.value.code
        return
    options = cli.parsed(words)
    override(SamplingConfig(), getattr(options, "sampling", []), "sampling")
    if file := getattr(options, "config", None):
        values = load(file, options.changes)
        checks = {cli.train: run_config, cli.plan: run_config, build: lambda v: from_dict(BuildConfig, v)}
        checks[moving_mnist] = run_config
        checks[phyworld] = lambda v: from_dict(PhyworldBench, v)
        checks[cli.quickstart] = lambda v: from_dict(QuickstartConfig, v)
        assert checks[options.function](values)


def test_each_line_of_a_shell_block_is_of_a_kind_that_is_checked():
    assert {kind for _, kind, _ in BLOCKS} <= set(BLOCK_KINDS)
    checked = {*COMMANDS, *SCRIPTS}
    unknown = [line for line in LINES if line not in checked and not re.match(rf"({OTHER_LINES})|\S*pip install", line)]
    assert not unknown


def test_blocks_are_shell():
    for file, block in SHELL:
        assert subprocess.run(["bash", "-n"], input=block, text=True).returncode == 0, (file, block)


class Parsed(Exception):
    """Stop a script in place of its work."""


@pytest.mark.parametrize("line", SCRIPTS)
def test_each_script_takes_its_options(line, monkeypatch):
    def parse(parser, arguments=None, namespace=None):
        assert not (rest := parser.parse_known_args(arguments, namespace)[1]), rest
        raise Parsed

    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words[script:])
    monkeypatch.setattr(sys, "path", [str(Path(words[script]).parent), *sys.path])
    try:
        runpy.run_path(words[script], run_name="__main__")
    except Parsed:
        return
    except ModuleNotFoundError as error:
        assert error.name in OF_EXTRAS
        pytest.skip(f"{error.name} is of an extra")
    pytest.fail("it reads no options")


@pytest.mark.parametrize("line", INSTALLS)
def test_each_installation_is_of_something(line):
    extras = ConfigParser()
    extras.read(ROOT / "setup.cfg")
    for word in shlex.split(line)[1:]:
        if word.startswith("."):
            named = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word).group(1)
            assert not named or set(named.split(",")) <= set(extras["options.extras_require"])
        elif word not in ("-e", "-q"):
            Requirement(word)


@pytest.fixture(scope="module")
def quick(chain):  # noqa: F811
    """load_run(folder) that gives the quickstart's run, in its tiny form, and samples in two steps."""
    with one_device():
        run = load_run(chain.quickstart / "transformer")
    sampling = dataclasses.replace(run.config.sampling, steps="2")
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, sampling=sampling))
    return lambda folder: run


@pytest.mark.filterwarnings("ignore")  # of words that a tiny run has not seen
@pytest.mark.parametrize("file", EXECUTED)
def test_python_runs_as_it_stands(file, quick, chain, tmp_path, monkeypatch):  # noqa: F811
    """The blocks of a page in turn; a comment behind a value is its shape: `tokens = ...  # (1, 48, 72)`."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(chain.quickstart)
    write_video(tmp_path / "clip.mp4", np.full((9, 24, 36, 3), 90, np.uint8), 8)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sora_jax, "load_run", quick)
    names: dict = {}
    for block in (block for page, _, block in PYTHON if page == file):
        with one_device():
            exec(compile(block, file, "exec"), names)
        for name, shape in re.findall(r"^ *\(?(\w+),?\)? = .*  # (\([\d, ]*\))$", block, re.MULTILINE):
            assert np.shape(names[name]) == ast.literal_eval(shape), name
    assert "run" in names


def options_of(parser) -> set[str]:
    """Return the options of a parser and of its subparsers."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            found = found.union(*map(options_of, action.choices.values()))
    return found


def has_field(kind, path: list[str]) -> bool:
    """Return True if a dataclass, or one of several that a field may hold, has the field at the end of a path."""
    if not path:
        return True
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind, include_extras=True)
        return path[0] in hints and has_field(hints[path[0]], path[1:])
    marks = [mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, OneOf)]
    return any(has_field(member, path) for member in (marks[0].table if marks else typing.get_args(kind)))


@pytest.mark.parametrize("file", FILES)
def test_each_option_in_the_text_exists(file):
    known = options_of(cli.make_parser()) | OTHERS
    runs = (*(kind.config for kind in KINDS.values()), BuildConfig, QuickstartConfig, PhyworldBench)
    named = {name for span in spans(file) for name in re.findall(r"(?<![\w=-])--[\w.-]+|^config\.[\w.]+", span)}
    of_metrics = {name: (type(metric.options),) for name, metric in METRICS.items() if metric.options is not None}
    for name in named - {"config.py", "config.json"}:
        group, _, path = name.removeprefix("--").partition(".")
        if path == "NAME":
            assert group in {"config", "sampling", "METRIC", *of_metrics}, name
        elif path:
            holders = ({"config": runs, "sampling": (SamplingConfig,)} | of_metrics)[group]
            assert any(has_field(holder, path.split(".")) for holder in holders), name
        else:
            assert name in known, name


def member(owner, name: str):
    """Return an attribute, or the type of the field of a dataclass."""
    if dataclasses.is_dataclass(owner) and name in (hints := typing.get_type_hints(owner)):
        return hints[name]
    return getattr(owner, name)


def value_of(node: ast.expr, names: dict):
    """Return what a name, or an attribute of one, stands for."""
    return names[node.id] if isinstance(node, ast.Name) else member(value_of(node.value, names), node.attr)


@pytest.mark.parametrize("source", [pytest.param(b, id=f"{f}-{i}") for f, i, b in PYTHON if f not in EXECUTED])
def test_python_names_what_there_is(source):
    tree, names = ast.parse(source), {}
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name: getattr(importlib.import_module(node.module), alias.name) for alias in node.names}
    assert "sora_jax" in names
    calls = 0
    for node in tree.body:
        for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
            function = value_of(call.func, names)
            if function is dataclasses.replace:
                allowed = typing.get_type_hints(value_of(call.args[0], names))
            else:
                allowed = inspect.signature(function).parameters
            assert {keyword.arg for keyword in call.keywords} <= set(allowed), ast.unparse(call)
            calls += 1
            if isinstance(node, ast.Assign) and node.value is call:
                made = function if isinstance(function, type) else typing.get_type_hints(function).get("return")
                names[node.targets[0].id] = made
    assert calls


def test_each_promise_names_tests_that_exist():
    promises = [row for row in PAGES["docs/promises.md"].splitlines() if row.startswith("| ")][1:]
    assert len(promises) >= 25
    for promise in promises:
        keepers = re.findall(r"`(tests/\w+\.py)::(\w+)`", promise)
        assert keepers, promise
        for file, name in keepers:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def anchors(page: str) -> set[str]:
    """Return the anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", LINKED)
def test_links_and_pictures_are_there(file):
    page = BLOCK.sub("", (ROOT / file).read_text(encoding="utf-8"))
    for link in map("".join, re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', page)):
        if not link.startswith("https://"):
            path, _, heading = link.partition("#")
            target = (ROOT / file).parent / path if path else ROOT / file
            assert target.exists(), link
            assert not heading or heading in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("file", FILES)
def test_each_file_in_the_text_exists(file):
    folders = "sora_jax|configs|tests|experiments|colab|docs|\\.ci"
    for path in (span for span in spans(file) if re.fullmatch(rf"({folders})/[\w./-]*(:[\w/,.]+)?(::\w+)?", span)):
        assert (ROOT / path.partition(":")[0]).exists(), path


@pytest.mark.parametrize("file", FILES)
def test_each_config_in_the_text_has_its_variant(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    for config in {span for span in spans(file) if re.fullmatch(r"configs/\w+\.py:[\w/,]+", span)}:
        load(config)


@pytest.mark.parametrize("file", FILES)
def test_each_extra_exists(file):
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    named = {extra for extras in re.findall(r"\.\[([\w,-]+)\]", PAGES[file]) for extra in extras.split(",")}
    assert named <= set(settings["options.extras_require"])


def test_each_script_exists():
    scripts = [word for line in LINES for word in re.findall(r"(?:^|\s)((?:\.ci|experiments|tests)/[\w./]+)", line)]
    assert scripts and all((ROOT / script).exists() for script in scripts)


@pytest.mark.parametrize(
    "file, field, known",
    [
        ("docs/training.md", "config.diffusion.process", PROCESSES),
        ("docs/training.md", "config.diffusion.prediction", FORMS),
        ("docs/training.md", "config.diffusion.times.distribution", QUANTILES),
        ("docs/training.md", "config.diffusion.weight.name", WEIGHTS),
        ("docs/sampling.md", "--solver", SOLVERS),
        ("docs/sampling.md", "--sampling.spacing", SPACINGS),
    ],
)
def test_a_row_of_values_has_all_there_are(file, field, known):
    (row,) = re.findall(rf"^\| `{re.escape(field)}` \|(.*)\|$", PAGES[file], re.MULTILINE)
    values = re.findall(r"`([\w]+)`", row.partition("needs")[0])
    assert sorted(set(values)) == sorted(known)


@pytest.mark.parametrize(
    "heading, known",
    [
        ("The mesh", [field.name for field in dataclasses.fields(MeshConfig)]),
        ("Attention", [*BACKENDS, "auto", *SEQUENCES, "auto"]),
        ("Memory", REMAT),
    ],
)
def test_a_table_of_values_has_all_there_are(heading, known):
    first = re.findall(r"^\| (`.*?`(?:, `.*?`)*)(?: \(default\))? \|", section("docs/pods.md", heading), re.MULTILINE)
    assert sorted(value.strip("`") for cell in first for value in cell.split(", ")) == sorted(known)


def test_the_table_of_configs_is_the_folder():
    named = re.findall(r"^\| `configs/(\w+\.py)` \|", section("README.md", "Configs"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def test_the_index_has_all_pages():
    """The tables of docs/README.md are the navigation of the site."""
    indexed = re.findall(r"^\| \[[^]]+\]\(([\w./-]+\.md)\)", PAGES["docs/README.md"], re.MULTILINE)
    others = ("card.md", "space/README.md")  # of models and of a Space: the site leaves them out, too
    pages = {os.path.relpath(ROOT / file, ROOT / "docs") for file in LINKED if not file.endswith(others)}
    assert sorted([*indexed, "README.md"]) == sorted(pages)


def rooms() -> list[tuple[int, str]]:
    """Return (floor, room) for each room of the table, without the ending of files."""
    rows = re.findall(r"^\| (\d+) \| (`.*?`) \|", section("docs/architecture.md", "Rooms"), re.MULTILINE)
    return [(int(floor), name.strip("`")) for floor, names in rows for name in names.split(", ")]


def test_the_table_of_rooms_is_the_package():
    package = ROOT / "sora_jax"
    there = [f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").exists()]
    there += [path.name for path in package.glob("*.py") if path.name != "__init__.py"]
    assert sorted(name for _, name in rooms()) == sorted(there)


def test_the_floors_are_those_of_the_import_contract():
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    layers = settings["importlinter:contract:floors"]["layers"].split("\n")
    height = {module.strip(): -i for i, layer in enumerate(layers) for module in layer.split(":")}
    floors = [(floor, height[f"sora_jax.{name.removesuffix('/').removesuffix('.py')}"]) for floor, name in rooms()]
    assert all(a[1] >= b[1] for a in floors for b in floors if a[0] > b[0])
