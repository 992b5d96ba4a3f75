"""Configure the documentation site. Its source folder is the repository, so links work as they do on GitHub.

sphinx-build -W --keep-going -c docs . build/site
"""

import re
from pathlib import Path

import sphinx.pycode.parser

import sora_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sora_jax"
INDEX = "docs/README"  # the start page: its tables are the navigation

project = "sora_jax"
author = "The sora_jax authors"
release = sora_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
root_doc = INDEX
include_patterns = ["README.md", "CONTRIBUTING.md", "docs/*.md", "docs/api/*.rst", "experiments/**.md"]
exclude_patterns = [".*", "build", "data", "dist", "runs", "sora_jax", "tests", "docs/_*"]
exclude_patterns += ["experiments/*/card.md", "experiments/demo"]

myst_enable_extensions = ["html_image"]
myst_heading_anchors = 4
suppress_warnings = ["ref.python"]  # the type `bytes` is no field of that name
toc_object_entries = False  # the contents of a page of the reference are its modules
default_role = "literal"  # `name` in a docstring is code, as in Markdown
highlight_language = "text"
smartquotes = False  # they turn `--` of options into a dash
add_module_names = False

autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    "member-order": "bysource",
    "ignore-module-all": True,
}
napoleon_use_ivar = True
autodoc_preserve_defaults = True
autodoc_mock_imports = ["apache_beam", "scenedetect", "torch", "transformers", "gradio", "wandb"]  # of extras
# A comment behind a field of a config is its documentation: Sphinx wants `#:` for it.
sphinx.pycode.parser.comment_re = re.compile(r"^\s*#:? ?(?!noqa|type:|fmt:|%%)(.*)\r?\n?$")

html_theme = "furo"
html_title = "sora_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
templates_path = [str(ROOT / "docs" / "_templates")]  # autosummary looks from the source folder
html_additional_pages = {"index": "index.html"}  # leads to the start page
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#b3261e", "color-brand-content": "#9a2018"},
    "dark_css_variables": {"color-brand-primary": "#ff8a7a", "color-brand-content": "#ff9d8f"},
}


def navigation(text: str) -> str:
    """Return the tables of contents of the site: one for each section of the start page, of the links in its table."""
    named: list[str] = []
    blocks = []
    for heading, section in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", text, re.MULTILINE):
        rows = re.findall(r"^\| \[([^]]+)\]\(([\w./-]+)\.md\)", section, re.MULTILINE)
        named += [page for _, page in rows]
        if rows:
            blocks.append(toctree(heading, [f"{title} <{page}>" for title, page in rows]))
    others = sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.stem not in [*named, "README"])
    return "\n\n".join([*blocks, *([toctree("More", others)] if others else []), toctree("API", ["api/sora_jax"])])


def toctree(caption: str, pages: list[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def complete(app, name: str, content: list[str]) -> None:
    """Add the navigation to the start page; mark blocks of commands, which have no language on GitHub, as shell."""
    if name == INDEX:
        content[0] = f"{content[0]}\n\n{navigation(content[0])}\n"
    commands = r"^```\n(?=(?:[\w./]*(?:sora-jax|python3?|pip|sphinx-build|pytest)|for|export|mkdir|[A-Z_]+=\S+) )"
    content[0] = re.sub(commands, "```shell\n", content[0], flags=re.MULTILINE)


def write_reference(app) -> None:
    """Write a page for each package, with the docstrings of its modules: a page for each module would be 230."""
    out = ROOT / "docs" / "api"
    out.mkdir(exist_ok=True)
    packages = {".".join(path.parent.relative_to(ROOT).parts): path.parent for path in PACKAGE.rglob("__init__.py")}
    for name, folder in packages.items():
        modules = [f"{name}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("__")]
        inner = sorted(other for other in packages if other.rpartition(".")[0] == name)
        parts = [heading(name.removeprefix("sora_jax."), "="), f".. automodule:: {name}"]
        parts += [front()] if name == "sora_jax" else []
        parts += [part for module in modules for part in (heading(module, "-"), f".. automodule:: {module}")]
        parts += ["\n".join([".. toctree::", "   :hidden:", "", *(f"   {other}" for other in inner)])] if inner else []
        page, text = out / f"{name}.rst", "\n\n".join(parts) + "\n"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)


def front() -> str:
    """Return a list of what `import sora_jax` offers."""
    modules = {name: getattr(sora_jax, name).__module__ for name in sora_jax.__all__}
    return "\n".join(f"- :obj:`sora_jax.{name} <{module}.{name}>`" for name, module in modules.items())


def heading(text: str, line: str) -> str:
    return f"{text}\n{line * len(text)}"


def as_rst(app, what, name, thing, options, lines: list[str]) -> None:
    """Turn a docstring, which is plain text with `code`, into reST; sections such as `Raises:` are for napoleon.

    A paragraph with lines indented below others, with columns or with several `name: meaning` keeps its lines.
    """
    if not (getattr(thing, "__module__", None) or name).startswith("sora_jax"):
        return
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    first = ["\\ "] if what in ("attribute", "data", "property") else []  # napoleon reads `A: B` there as type A
    lines[:] = first + "\n\n".join(map(paragraph_as_rst, paragraphs)).split("\n")


def paragraph_as_rst(text: str) -> str:
    if not re.match(r"(Args|Attributes|Raises|Returns|Yields|Warns):\n", text):
        starts = re.findall(r"^[\w(), ]+: ", text, re.MULTILINE)
        if len(starts) > 1 or re.search(r"^ +\S|\S {2,}\S", text, re.MULTILINE):
            return "::\n\n" + re.sub(r"^", "    ", text, flags=re.MULTILINE)
    parts = re.split(r"(`[^`]+`)", text)  # odd ones are code
    parts[::2] = [re.sub(r"([\\|*`@]|_(?!\w))", r"\\\1", part) for part in parts[::2]]
    return re.sub(r"(?<=\w)(`[^`]+`)|(`[^`]+`)(?=\w)", r"\\ \1\2\\ ", "".join(parts))


def setup(app) -> None:
    app.connect("builder-inited", write_reference, priority=100)
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", as_rst, priority=100)
