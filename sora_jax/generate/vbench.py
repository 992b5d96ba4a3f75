"""Write clips of a list of prompts as VBench looks for them (Huang et al. 2024, github.com/Vchitect/VBench).

VBench lists one folder and looks for PROMPT-INDEX.mp4, the prompt as it stands in its list (`vbench/__init__.py`);
VBench-2.0 looks for the first 180 characters of the prompt. There are five clips of each prompt, and 25 of those of the
dimension `temporal_flickering`, of which a filter takes the ones that stand still (`prompts/README.md`). VBench takes
the ending of the first file that it sees for that of all, so nothing but the clips is in the folder: their recipes are
in their metadata alone.

A clip is a function of (prompt, seed), with seeds that count up from `--seed` for the clips of a prompt.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_jax.config import check
from sora_jax.console import note, progress
from sora_jax.data.storing.clips import clip_id_of
from sora_jax.data.viewing.write import write_chunks
from sora_jax.errors import UserError
from sora_jax.files import as_path, make_folder, read_text
from sora_jax.generate.prompts import Row
from sora_jax.generate.recipe import make_recipe, read_recipe
from sora_jax.generate.requests import Request
from sora_jax.generate.run import Run

LONGEST = 180  # characters of a prompt in a file name
USUAL = 5  # clips of a prompt
MORE = {"temporal_flickering": 25, "Diversity": 20}  # clips of the prompts of a dimension; Diversity is of VBench-2.0
IDENTITY = ("config", "step", "command", "rows")  # of a recipe: what a clip depends on


@dataclasses.dataclass(frozen=True)
class Listed:
    """Hold a prompt of a list, and how many clips there are of it."""

    prompt: str
    samples: int

    def path(self, folder: Path, index: int) -> Path:
        """Return the file of one of its clips."""
        return folder / f"{self.prompt[:LONGEST]}-{index}.mp4"

    @property
    def row(self) -> Row:
        """Return the prompt as a row of a file of prompts; the noise of a prompt is its own."""
        return {"prompt": self.prompt, "clip_id": clip_id_of(self.prompt)}


def read_list(path: str | Path, samples: int | None = None) -> list[Listed]:
    """Read a list of prompts: a JSON list of {"prompt_en", "dimension"}, as VBench_full_info.json is, or a text file.

    samples: clips of each prompt; None: as VBench asks for, which the dimensions say.

    Raises:
        UserError: the file is missing or no such list, or VBench could not find the clips of a prompt by its name.
    """
    path = as_path(path)
    said = f"--vbench is {str(path)!r}"
    check(samples is None or samples > 0, f"--samples is {samples}; it must be at least 1")
    check(path.is_file(), f"{said}; there is no such file")
    try:
        text = read_text(path)
        entries = json.loads(text) if path.suffix.lower() == ".json" else None
    except ValueError as error:  # of the decoder of UTF-8, too
        raise UserError(f"{said}; it cannot be read: {error}") from error
    if entries is None:
        entries = [{"prompt_en": line.strip()} for line in text.splitlines() if line.strip()]
    whole = isinstance(entries, list) and all(
        isinstance(e, dict) and isinstance(e.get("prompt_en"), str) for e in entries
    )
    check(whole and entries, f"{said}; it must be a list of objects with prompt_en, as VBench_full_info.json is")
    found: dict[str, int] = {}
    for entry in entries:
        most = samples or max(MORE.get(name, USUAL) for name in [*entry.get("dimension", []), ""])
        found[entry["prompt_en"]] = max(most, found.get(entry["prompt_en"], 0))
    _check_names(said, list(found))
    return [Listed(prompt, most) for prompt, most in found.items()]


def _check_names(said: str, prompts: Sequence[str]) -> None:
    names: dict[str, str] = {}
    for prompt in prompts:
        possible = prompt.strip() and not set("/\0") & set(prompt)
        check(possible, f"{said}; {prompt!r} cannot be the name of a file, by which VBench finds a clip")
        other = names.setdefault(prompt[:LONGEST], prompt)
        check(other == prompt, f"{said}; two prompts have the same first {LONGEST} characters: {prompt!r}")


def export(asked: Any, listed: Sequence[Listed], requests: Sequence[Request], run: Run) -> list[Path]:
    """Write the clips of a command (`options.Asked`) that its folder does not have yet; return all files.

    Raises:
        UserError: a file of such a name is there that other weights or options have made.
    """
    options, folder = asked.options, asked.options.out
    make_folder(folder)
    most, total = max(each.samples for each in listed), sum(each.samples for each in listed)
    missing: list[list[int]] = [[] for _ in range(most)]  # prompts without a file, by number, of each index
    for number, each in enumerate(listed):
        for index in range(each.samples):
            path = each.path(folder, index)
            if path.exists():
                _check_recipe(path, _recipe(asked, run.step, each, options.seed + index))
            else:
                missing[index].append(number)
    there = total - sum(map(len, missing))
    if there:
        note(f"{there} of {total} clips are in {folder}")
    with progress(total=total, desc="vbench", unit="clip", initial=there) as bar:
        for index, numbers in enumerate(missing):
            seed, chosen = options.seed + index, [requests[number] for number in numbers]
            for place, clip in run.stream(chosen, asked.sampling, seed, asked.tiles) if chosen else ():
                each = listed[numbers[place]]
                facts = {"upscale": options.upscale, "size": clip.shape[1:3]}
                recipe = _recipe(asked, run.step, each, seed) | facts
                fps = options.fps or asked.config.preview.fps
                write_chunks(each.path(folder, index), iter([clip]), fps, options.upscale, json.dumps(recipe))
                bar.update()
    return [each.path(folder, index) for each in listed for index in range(each.samples)]


def _recipe(asked: Any, step: int, each: Listed, seed: int) -> dict:
    """Return the recipe of a clip: that of `sora-jax sample` for its prompt alone, with its seed."""
    words = [word for word in asked.made_by.command if not word.startswith("--seed=")]
    made_by = dataclasses.replace(asked.made_by, command=[*words, f"--seed={seed}"], rows=[each.row])
    return make_recipe(made_by, step, 0, {"prompt": each.prompt, "seed": seed, "clip_id": each.row["clip_id"]})


def _check_recipe(path: Path, wanted: dict) -> None:
    try:
        found = read_recipe(path)
    except UserError:
        found = {}
    same = all(found.get(name) == wanted[name] for name in IDENTITY)
    what = "was made by another checkpoint or with other options" if found else "was made by another program"
    check(same, f"--out is {str(path.parent)!r}; {path.name!r} there {what}: give another folder")
