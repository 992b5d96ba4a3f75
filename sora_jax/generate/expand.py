"""Rewrite short prompts into captions as training has them, by one of three hooks.

Sora "turns short user prompts into longer detailed captions" (OpenAI 2024, after DALL-E 3); models that read long
captions in training are asked with long ones.

========================  ================================================================================
`world`                   rules for the embedded world: what a prompt leaves unsaid is chosen by the seed
`http://HOST/v1#MODEL`    any endpoint with OpenAI's chat interface; the key is in OPENAI_API_KEY, if it needs one
`transformers:MODEL`      an instruction-tuned language model of `transformers`, a name or a folder (extra `[text]`)
========================  ================================================================================
"""

import dataclasses
import http.client
import json
import os
import random
import urllib.request
from collections.abc import Callable, Sequence

from sora_jax.config import check
from sora_jax.errors import UserError, install_command
from sora_jax.generate.prompts import spans_of
from sora_jax.worlds.captions import COLOURS, DIRECTIONS, TONES, parse, write

INSTRUCTION = (
    "Rewrite the user's prompt for a text-to-video model as one detailed caption of what is seen: subjects, their "
    "looks, what they do, the place, the light and the camera. Keep all that the prompt says. Answer with the caption "
    "alone."
)
SECONDS = 60
Expand = Callable[[str], str]


def expand_prompts(prompts: Sequence[str], how: str, seed: int = 0) -> list[str]:
    """Return the prompts rewritten by the hook `how`; of one that changes in time every part by itself.

    Raises:
        UserError: there is no such hook, or it fails.
    """
    hook = _hook(how, seed)

    def expand(prompt: str) -> str:
        spans = spans_of(prompt)
        if len(spans) == 1:
            return hook(prompt)
        return " ".join(f"{frame}: {hook(text)}" for frame, text in spans)

    return [expand(prompt) for prompt in prompts]


def _hook(how: str, seed: int) -> Expand:
    if how == "world":
        return lambda prompt: describe_world(prompt, seed)
    if how.startswith(("http://", "https://")):
        return _endpoint(how, seed)
    known = how.startswith("transformers:")
    check(known, f"--expand is {how!r}; it must be world, http://HOST/v1#MODEL or transformers:MODEL")
    return _language_model(how.removeprefix("transformers:"))


def describe_world(prompt: str, seed: int) -> str:
    """Say what a prompt of the embedded world leaves open: colours, a motion, a background.

    A prompt that names no shape is returned as it is. Equal prompts and seeds give equal captions.
    """
    said, draw = parse(prompt), random.Random(f"{seed} {prompt}")
    if not said.shapes:
        return prompt
    shapes = []
    for shape in said.shapes:
        colour = shape.colour or draw.choice(list(COLOURS))
        named = [way for way in DIRECTIONS if " " not in way and way in prompt.lower().split()]
        way = draw.choice(named or [way for way in DIRECTIONS if " " not in way])
        motion = (shape.motion, shape.direction) if shape.motion else ("move", way)
        shapes.append(dataclasses.replace(shape, colour=colour, motion=motion[0], direction=motion[1]))
    tone = said.tone or draw.choice(list(TONES))
    camera = said.camera or "still"
    return write(
        dataclasses.replace(said, shapes=tuple(shapes), style=said.style or "plain", tone=tone, camera=camera),
        "sentence",
    )


def _endpoint(address: str, seed: int) -> Expand:
    base, _, model = address.partition("#")

    def ask(prompt: str) -> str:
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
        body = {"model": model or "default", "messages": messages, "temperature": 0, "seed": seed}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{base.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return str(json.load(answer)["choices"][0]["message"]["content"]).strip()
        except (http.client.HTTPException, OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"--expand is {address!r}; it does not answer: {error}") from error

    return ask


def _language_model(name: str) -> Expand:
    try:
        from transformers import pipeline
    except ImportError as error:
        raise UserError(f"--expand is 'transformers:{name}'; it needs {install_command('text')}") from error
    try:
        generate = pipeline("text-generation", model=name)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--expand is 'transformers:{name}'; the model cannot be loaded: {error}") from error

    def ask(prompt: str) -> str:
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]
        try:
            answer = generate(messages, max_new_tokens=256, do_sample=False, return_full_text=False)
            return str(answer[0]["generated_text"]).strip()
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"--expand is 'transformers:{name}'; the model does not answer: {error}") from error

    return ask
