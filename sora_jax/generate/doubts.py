"""Say in a line what a run does not read of a request, or has never learnt: the result would be noise, or another clip.

Lines are for the command line, for `Run.generate` and for the start of a training, which shows previews later.
"""

import dataclasses
import math
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from sora_jax.config import check
from sora_jax.data.feeding.tokenizer import Reading
from sora_jax.data.packing.packs import grid_of
from sora_jax.errors import UserError
from sora_jax.generate.prompts import spans_of
from sora_jax.generate.requests import Request, size_of
from sora_jax.models.first_stage import FirstStageConfig
from sora_jax.train.denoiser import DenoiserRun, Text
from sora_jax.train.seen import ClipSize, Seen, words_of

EACH = 4  # texts with the same trouble that are told one by one
NOISE = 3.0  # times the sizes of training, from which on clips are noise
WORDS = 6  # words that are named
ROLES = ("prompt", "negative prompt", "prompt of the given clip")


def print_lines(lines: Iterable[str]) -> None:
    """Print each line to stderr, once."""
    for line in dict.fromkeys(lines):
        print(f"sora-jax: {line}", file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Learnt:
    """Hold what a run has learnt, to compare requests with; seen: the data of its training, None where not known."""

    config: DenoiserRun
    first_stage: FirstStageConfig
    tokenizer: Text
    seen: Seen | None

    def check_spelt(self, requests: Sequence[Request]) -> None:
        """Raise a UserError for a text of which nothing is known: all such texts would give the same clip."""
        text_config = self.config.model.text
        mend = "write it in words of the captions of training (a new run with tokenizer.kind = 'bytes' knows all)"
        mend = "write it in a language of that encoder" if text_config and text_config.pretrained else mend
        for role, text in _texts(requests):
            found = self.tokenizer.read(text)
            letters = [letter for letter in "".join(found.unknown) if letter.isalpha()]
            scripts = ", ".join(dict.fromkeys(map(_script, letters)))
            written = f" ({scripts})" if scripts else ""
            check(
                found.spelt,
                f"{role} is {text!r}; the tokenizer of this run knows none of its words{written}: {mend}",
            )

    def doubts(self, requests: Sequence[Request]) -> list[str]:
        """Return a line for each thing about requests that the run does not read or has not learnt."""
        lines = self.of_texts(requests) + self.of_sizes(requests)
        return [*lines, *self._empty(requests), *self._guidance(requests)]

    def of_texts(self, requests: Sequence[Request]) -> list[str]:
        """Return lines for prompts and negatives that are cut, and for words that are not known."""
        if not self.config.model.text:
            return []
        lines, seen = [], None if self.config.model.text.pretrained else self.seen
        for role in ROLES:
            readings = [self.tokenizer.read(text) for other, text in _texts(requests) if other == role]
            lines += _cut(role, readings) + _unknown(role, readings) + _new_words(role, readings, seen)
        return lines

    def _empty(self, requests: Sequence[Request]) -> list[str]:
        """Return a line where a prompt is empty and guidance therefore does nothing; tasks may well have none."""
        plain = [r for r in requests if r.known is None and r.label < 0 and r.guidance != 1.0]
        empty = any(not r.prompt.strip() and not r.negative.strip() for r in plain)
        return ["prompt is ''; it is the null caption, so there is nothing for guidance to change"] if empty else []

    def _guidance(self, requests: Sequence[Request]) -> list[str]:
        """Return a line where guidance leads away from a caption that was never learnt."""
        scales = [r.guidance for r in requests if r.guidance != 1.0 and not r.negative.strip()]
        if not scales or not self.never_dropped:
            return []
        away = "leads away from what was never learnt"
        why = f"the run never dropped its captions (diffusion.caption_dropout is 0), so it {away}"
        return [f"guidance is {scales[0]:g}; {why}: take a guidance of 1, or a negative prompt"]

    @property
    def never_dropped(self) -> bool:
        """Return True if no clip was trained on without its caption, as far as is known."""
        began = self.config.init.weights  # with those of a run whose training is not known, if nothing is seen
        known = not began if self.seen is None else not self.seen.dropped
        return known and not self.config.diffusion.caption_dropout

    def of_sizes(self, requests: Sequence[Request]) -> list[str]:
        """Return a line where clips are far larger or smaller than those of training."""
        if self.seen is None:
            return []
        sizes = (
            ClipSize(math.prod(grid_of(latent, self.config.model.patch)), *size_of(self.first_stage, latent))
            for latent in dict.fromkeys(request.size for request in requests)
        )
        far = [size for size in sizes if self.seen.is_far(size)]
        if not far:
            return []
        one = max(far, key=self.seen.distance)
        others = f" (the farthest of {len(far)} such sizes)" if len(far) > 1 else ""
        asked = f"a clip of {one.frames}x{one.height}x{one.width} has {one.tokens:,} tokens{others}"
        expect = "expect noise" if self.seen.distance(one) > NOISE else "the clip may be poor"
        return [f"{asked}; the clips of training had {self.seen.sizes}, so {expect}"]


def _texts(requests: Sequence[Request]) -> list[tuple[str, str]]:
    """Return the role and the words of all texts, each once; of a prompt that changes in time, each part."""
    found = [(ROLES[0], part) for request in requests for part in _parts(request.prompt)]
    found += [(ROLES[1], request.negative) for request in requests]
    found += [(ROLES[2], r.known.source) for r in requests if r.known is not None and r.known.source is not None]
    return list(dict.fromkeys(found))


def _parts(prompt: str) -> list[str]:
    try:
        return [text for _, text in spans_of(prompt)]
    except UserError:  # it only looks like one that changes in time
        return [prompt]


def _cut(role: str, readings: Sequence[Reading]) -> list[str]:
    def one(found: Reading) -> str:
        return f"{role} {found.text!r} has {found.tokens} tokens; this run reads the first {found.most}"

    def many(cut: Sequence[Reading]) -> str:
        longest, most = max(found.tokens for found in cut), cut[0].most
        return f"{len(cut)} of {len(readings)} {role}s have up to {longest} tokens; this run reads the first {most}"

    return _line_of_each([found for found in readings if found.is_cut], one, many)


def _unknown(role: str, readings: Sequence[Reading]) -> list[str]:
    def one(found: Reading) -> str:
        return f"{role} {found.text!r} has words that the tokenizer of this run does not know: {_named(found.unknown)}"

    def many(unknown: Sequence[Reading]) -> str:
        words = [word for found in unknown for word in found.unknown]
        return f"{len(unknown)} of {len(readings)} {role}s have words that the tokenizer does not know: {_named(words)}"

    return _line_of_each([found for found in readings if found.unknown], one, many)


def _new_words(role: str, readings: Sequence[Reading], seen: Seen | None) -> list[str]:
    if seen is None:
        return []
    told = {word for found in readings for part in found.unknown for word in words_of(part)}
    words = [word for found in readings for word in seen.new_words(found.text) if word not in told]
    return [f"{seen.captions} {_named(words)}, which a {role} has"] if words else []


def _line_of_each(
    readings: Sequence[Reading], one: Callable[[Reading], str], many: Callable[[Sequence[Reading]], str]
) -> list[str]:
    """Return a line for each reading, or one for all where they are many."""
    return list(map(one, readings)) if len(readings) <= EACH else [many(readings)]


def _named(words: Sequence[str]) -> str:
    """List words, each once; of many the first."""
    words = list(dict.fromkeys(words))
    more = f" and {len(words) - WORDS} more" if len(words) > WORDS else ""
    return ", ".join(map(repr, words[:WORDS])) + more


def _script(letter: str) -> str:
    """Return the script of a letter, as Unicode names it."""
    name = unicodedata.name(letter, "unnamed").split()[0]
    return name if name == "CJK" else name.title()
