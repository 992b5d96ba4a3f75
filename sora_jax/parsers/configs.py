"""Parse `sora-jax configs`: list the config files that came with the package, or show one."""

import argparse
import ast
from pathlib import Path
from typing import Any

from sora_jax.config import check
from sora_jax.config_files import find_config, package_configs
from sora_jax.parsers.base import add_json, make_parser


def add_configs(commands) -> None:
    """Add the command `configs`."""
    example = (
        "examples:\n  sora-jax configs\n  sora-jax configs video     its commands, hardware and time\n"
        "`sora-jax train --config=configs/video.py --help` lists its fields"
    )
    about = "list the config files that came with the package, or describe one"
    p = make_parser(commands.add_parser, "configs", help=about, epilog=example)
    p.add_argument("name", nargs="?", help="video, video.py or configs/video.py: print what stands at its top")
    add_json(p)
    p.set_defaults(function=configs)


def configs(options: argparse.Namespace) -> None:
    """Print the list, or the docstring of one file."""
    from sora_jax import console

    if options.name is None:
        found = list_configs()
        console.result(found, _table(found))
        return
    name = Path(options.name.partition(":")[0]).name.removesuffix(".py")
    entry = read_file(Path(find_config(f"configs/{name}.py")))
    console.result(entry, f"{entry['text']}\n\nvariants: {_variants(entry)}")


def list_configs() -> list[dict[str, Any]]:
    """Return the file, variants and first sentence of each config file of the package."""
    folder = package_configs()
    check(folder, "the package came without config files")
    assert folder is not None
    return [{k: v for k, v in read_file(path).items() if k != "text"} for path in sorted(folder.glob("*.py"))]


def read_file(path: Path) -> dict[str, Any]:
    """Return what a config file says of itself; it is parsed, not run.

    The names in its VARIANTS are written behind a colon; the first one is the default, and "" is the file alone.
    """
    from sora_jax.field_docs import summary

    tree = ast.parse(path.read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    text = ast.get_docstring(tree) or ""
    variants = ast.literal_eval(assigned["VARIANTS"]) if "VARIANTS" in assigned else ("",)
    return {"file": f"configs/{path.name}", "variants": list(variants), "about": summary(text), "text": text}


def _variants(entry: dict[str, Any]) -> str:
    return ", ".join(name or "(none)" for name in entry["variants"])


def _table(found: list[dict[str, Any]]) -> str:
    rows = [(entry["file"], f"{entry['about']} [{_variants(entry)}]") for entry in found]
    formatter = argparse.HelpFormatter("", max_help_position=30)
    formatter.start_section("--config=FILE or FILE:VARIANT; each with its [variants], the default first")
    for file, about in rows:
        formatter.add_argument(argparse.Action([file], dest="", nargs=0, help=about.replace("%", "%%")))
    formatter.end_section()
    return formatter.format_help().rstrip()
