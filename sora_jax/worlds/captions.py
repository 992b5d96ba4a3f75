"""Write the captions of the embedded world, and parse prompts in the same vocabulary.

Writing and parsing are inverses: `parse(write(wanted, level)) == facts_at(wanted, level)`.
Directions are those on the screen: "moves left" means that the shape moves left in the picture, whatever the camera
does. A camera move shows in the backdrop: when "the camera pans left", the backdrop slides right.
"""

from __future__ import annotations

import re
from bisect import bisect
from dataclasses import dataclass, replace

# Ordered by hue, so that neighbours in this table are neighbours on the colour wheel.
COLOURS = {
    "red": (225, 25, 35),
    "orange": (255, 128, 0),
    "yellow": (255, 236, 20),
    "green": (0, 165, 60),
    "cyan": (0, 210, 225),
    "blue": (30, 60, 230),
    "purple": (130, 35, 190),
    "pink": (255, 70, 190),
}
# Nearly neutral, so that a shape is known from its backdrop by saturation; light or dark, because compression keeps
# edges in light far better than edges in hue alone.
TONES = {
    "white": (236, 236, 236),
    "grey": (178, 178, 178),
    "black": (26, 26, 26),
    "sand": (206, 187, 152),
    "slate": (42, 54, 72),
}
KINDS = ("circle", "square", "triangle", "cross", "ring", "star")
STYLES = ("plain", "gradient", "textured")
DESCRIPTIONS = ("tags", "sentence", "full")  # caption levels with the background, and the camera if it moves
SHORT = ("short", "short_tags", "shape")  # levels with the shapes alone, as in a first prompt of a user
LEVELS = DESCRIPTIONS + SHORT
# Diameter at the first frame as a share of the short side; the gaps keep the words apart.
SIZES = {"small": (0.20, 0.30), "medium": (0.34, 0.42), "large": (0.46, 0.70)}
DIRECTIONS = {
    "right": (1, 0),
    "down": (0, 1),
    "left": (-1, 0),
    "up": (0, -1),
    "down and right": (1, 1),
    "down and left": (-1, 1),
    "up and left": (-1, -1),
    "up and right": (1, -1),
}
AXES = {"left and right": (1, 0), "up and down": (0, 1)}
TURNS = {"clockwise": 1, "counterclockwise": -1}
CAMERAS = {
    "still": "stays still",
    "pan left": "pans left",
    "pan right": "pans right",
    "pan up": "pans up",
    "pan down": "pans down",
    "zoom in": "zooms in",
    "zoom out": "zooms out",
}
_VERBS = {
    "still": ("stays still", (None,)),
    "move": ("moves {}", DIRECTIONS),
    "bounce": ("bounces {}", AXES),
    "orbit": ("orbits {}", TURNS),
    "rotate": ("spins {}", TURNS),
    "grow": ("grows", (None,)),
    "shrink": ("shrinks", (None,)),
    "pass": ("moves {} in front of", ("right", "down", "left", "up")),
}
# A pass is the motion of two shapes: the one in front moves, the one after it in the caption lies "behind".
MOTIONS = tuple(_VERBS)
PHRASES = {(m, d): verb.format(d) for m, (verb, ways) in _VERBS.items() for d in ways}
_NUMBERS = ("no", "one", "two", "three")


@dataclass(frozen=True)
class WantedShape:
    """Facts of one shape; None for those that a caption leaves out."""

    colour: str | None
    kind: str
    size: str | None = None
    motion: str | None = None
    direction: str | None = None


@dataclass(frozen=True)
class Wanted:
    """Facts of a clip: shapes (of a "pass" the one in front first), backdrop style and tone, camera."""

    shapes: tuple[WantedShape, ...]
    style: str | None = None
    tone: str | None = None
    camera: str | None = None


def size_word(diameter: float) -> str:
    """Return the size word of a diameter in short sides; the thresholds lie in the gaps between the ranges."""
    edges = [(SIZES[a][1] + SIZES[b][0]) / 2 for a, b in (("small", "medium"), ("medium", "large"))]
    return tuple(SIZES)[bisect(edges, diameter)]


def facts_at(wanted: Wanted, level: str) -> Wanted:
    """Select the facts that a caption of this level states.

    Only the full description states sizes and a camera at rest. A short caption leaves out background and camera, and
    "shape" everything but colour and kind.
    """
    if level == "full":
        return wanted
    if level == "shape":
        return Wanted(tuple(WantedShape(s.colour, s.kind) for s in wanted.shapes))
    shapes = tuple(replace(s, size=None) for s in wanted.shapes)
    if level in SHORT:
        return Wanted(shapes)
    camera = None if wanted.camera == "still" else wanted.camera
    return replace(wanted, shapes=shapes, camera=camera)


def write(wanted: Wanted, level: str) -> str:
    """Write the caption of a clip at one of the LEVELS; equal facts always give equal words."""
    facts = facts_at(wanted, level)
    if level in SHORT:
        tags = level == "short_tags"
        return (", " if tags else " and ").join(_clauses(facts.shapes, articles=not tags, comma=tags))
    camera = facts.camera and f"camera {CAMERAS[facts.camera]}"
    if level == "tags":
        tail = [f"{facts.style} {facts.tone} background"] + ([camera] if camera else [])
        return ", ".join(_clauses(facts.shapes, articles=False, comma=True) + tail)
    clauses = _clauses(facts.shapes, articles=True, comma=False)
    if level == "sentence":
        text = f"{' and '.join(clauses)} on a {facts.style} {facts.tone} background"
        return f"{text} while the {camera}" if camera else text
    number = f"{_NUMBERS[len(facts.shapes)]} shape{'s' if len(facts.shapes) > 1 else ''}"
    text = f"{number}: {', '.join(clauses)}. the background is {facts.style} {facts.tone}."
    return f"{text} the {camera}." if camera else text


def _clauses(shapes: tuple[WantedShape, ...], articles: bool, comma: bool) -> list[str]:
    clauses: list[str] = []
    joined = False
    for shape in shapes:
        words = " ".join(w for w in (shape.size, shape.colour, shape.kind) if w)
        if articles:
            words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
        phrase = PHRASES.get((shape.motion or "", shape.direction), "")
        clause = f"{words}{', ' if comma and phrase else ' ' if phrase else ''}{phrase}"
        if joined:
            clauses[-1] += " " + clause
        else:
            clauses.append(clause)
        joined = shape.motion == "pass"
    return clauses


_NOUN = re.compile(rf"\b(?:({'|'.join(SIZES)}) )?(?:({'|'.join(COLOURS)}) )?({'|'.join(KINDS)})\b")
_BACKDROP = re.compile(rf"\b({'|'.join(STYLES)})\s+({'|'.join(TONES)})\b")
_CAMERA = re.compile(rf"\bcamera ({'|'.join(CAMERAS.values())})\b")
_LONGEST_FIRST = sorted(PHRASES, key=lambda way: -len(PHRASES[way]))


def parse(prompt: str) -> Wanted:
    """Return the facts that a prompt of any caption level states; those left out, or in other words, are None."""
    text = prompt.lower()
    scene = text.split("camera")[0]
    nouns = list(_NOUN.finditer(scene))
    bounds = [noun.start() for noun in nouns] + [len(scene)]
    shapes: list[WantedShape] = []
    for noun, end in zip(nouns, bounds[1:], strict=True):
        size, colour, kind = noun.groups()
        motion, direction = _motion(scene[noun.end() : end])
        if shapes and shapes[-1].motion == "pass":
            motion, direction = "behind", None
        shapes.append(WantedShape(colour, kind, size, motion, direction))
    backdrop, camera = _BACKDROP.search(scene), _CAMERA.search(text)
    style, tone = backdrop.groups() if backdrop else (None, None)
    moves = {phrase: name for name, phrase in CAMERAS.items()}
    return Wanted(tuple(shapes), style, tone, moves[camera.group(1)] if camera else None)


def _motion(words: str) -> tuple[str | None, str | None]:
    for way in _LONGEST_FIRST:
        if re.search(rf"\b{PHRASES[way]}\b", words):
            return way
    return None, None
