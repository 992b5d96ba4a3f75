"""What the README says is so: its commands are understood, its tests and files exist, CI runs its line."""

import ast
import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import sora_jax
from sora_jax.cli import make_parser
from sora_jax.config import load
from sora_jax.generate.run import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = ROOT / ".ci" / "run"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)\n```$", README, re.MULTILINE | re.DOTALL)
QUICKSTART = "python3 -m venv .venv && .venv/bin/pip install -e . && .venv/bin/sora-jax quickstart"
TESTS = "python3 -m venv .venv && .venv/bin/pip install -e '.[test]' && .venv/bin/pytest -n 2"
COMMANDS = [line for kind, block in BLOCKS for line in block.splitlines() if kind == "" and "sora-jax" in line]


def test_the_two_lines_stand_at_the_top():
    assert [block for _, block in BLOCKS[:2]] == [QUICKSTART, TESTS]
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


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_is_understood(command):
    words = shlex.split(command.rpartition("&&")[2].replace("=gs://", "=/"))  # what reads gs:// is an extra
    words = words[[Path(word).name for word in words].index("sora-jax") + 1 :]
    options, rest = make_parser().parse_known_args(words)
    changes = [word.removeprefix("--config.") for word in rest if word.startswith("--config.")]
    assert len(changes) == len(rest)
    if getattr(options, "config", None):
        file, _, variant = options.config.partition(":")
        load(f"{ROOT / file}:{variant}" if variant else str(ROOT / file), changes)


@pytest.mark.parametrize("source", [block for kind, block in BLOCKS if kind == "python"])
def test_python_names_what_there_is(source):
    tree = ast.parse(source)
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "sora_jax"}
    assert used and all(hasattr(sora_jax, name) for name in used)
    given = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    assert given <= {name for f in (sora_jax.load_run, Run.generate) for name in inspect.signature(f).parameters}


def test_each_promise_names_tests_that_exist():
    table = README.split("## Promises")[1].split("\n## ")[0]
    promises = [row for row in table.splitlines() if row.startswith("| ")][1:]
    for promise in promises:
        keepers = re.findall(r"`(tests/\w+\.py)::(\w+)`", promise)
        assert keepers, promise
        for file, name in keepers:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


@pytest.mark.parametrize("path", sorted(set(re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', README))))
def test_links_and_pictures_are_there(path):
    path, _, heading = next(filter(None, path)).partition("#")
    assert (ROOT / path).exists()
    assert not heading or re.search(rf"^#+ {heading}$", (ROOT / path).read_text(encoding="utf-8"), re.I | re.M)


def test_the_table_of_configs_is_the_folder():
    named = set(re.findall(r"^\| `configs/(\w+\.py)` \|", README, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "configs").glob("*.py")}


def test_the_table_of_rooms_is_the_package():
    table = README.split("## How the rooms hang together")[1].split("\n## ")[0]
    rooms = {name for row in re.findall(r"^\| \w* ?\| (`.*?`) \|", table, re.MULTILINE) for name in row.split(", ")}
    there = {f"`{path.name}/`" for path in (ROOT / "sora_jax").iterdir() if (path / "__init__.py").exists()}
    there |= {f"`{path.name}`" for path in (ROOT / "sora_jax").glob("*.py") if path.name != "__init__.py"}
    assert rooms == there
