"""Lay out the page: prompt, tabs and settings on the left, the clip on the right, clips to try below."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import gradio as gr

from sora_jax.demo import html
from sora_jax.demo.fields import AFTER, AREAS, BEFORE, LABELS, OWN, WIDER
from sora_jax.demo.studio import EXAMPLES, Studio
from sora_jax.generate.options import LONG, usual_frames

FORGOTTEN = 3600.0  # seconds after which the clips of a visit are dropped
RANDOM = "() => Math.floor(Math.random() * 4294967296)"
GAP = 8  # frames, as --gap


@dataclasses.dataclass
class Picker:
    """Choose a clip or a picture: upload it, take the clip that is shown, or an example."""

    chosen: gr.State
    preview: gr.HTML
    upload: gr.UploadButton
    shown: gr.Button
    example: gr.Button
    remove: gr.Button


@dataclasses.dataclass
class Tab:
    """Hold the fields of a task beside those that all tasks share, and its button."""

    fields: dict[str, Any]
    pickers: dict[str, Picker]
    button: Any = None


@dataclasses.dataclass
class Layout:
    """Hold what the page reads and writes. fields: those of all tasks. tabs: by task."""

    fields: dict[str, Any]
    tabs: dict[str, Tab]
    random: gr.Button
    message: gr.HTML
    result: gr.HTML
    cancel: gr.Button
    recipe: gr.Textbox
    history: gr.HTML
    gallery: gr.HTML
    clips: gr.State  # of this visit, newest first
    shown: gr.State


def lay_out(studio: Studio) -> Layout:
    """Lay out the page for a run, inside `gr.Blocks`."""
    clips, shown = gr.State([], time_to_live=FORGOTTEN), gr.State(None, time_to_live=FORGOTTEN)
    gr.HTML(html.head(studio.name, studio.run.step))
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=420):
            prompts = [prompt for prompt, _ in studio.prompts]
            prompt = gr.Textbox("".join(prompts[:1]), label="Prompt: what the clip shows", lines=2, elem_id="prompt")
            with gr.Tabs(overflow_behavior="wrap"):
                tabs = _tabs(studio)
            fields, random = _settings(studio)
        with gr.Column(scale=5, min_width=360):
            message = gr.HTML(elem_id="message")
            result = gr.HTML(html.result(None), elem_id="result")
            cancel = gr.Button("Cancel", size="sm", elem_id="cancel")
            recipe = gr.Textbox(label="The command that makes it again", lines=2, buttons=["copy"], interactive=False,
                                elem_id="recipe")  # fmt: skip
    gr.HTML(html.heading("Your clips", "Click one to show it again. They are forgotten when you leave."))
    history = gr.HTML(html.cards([], []), js_on_load=html.CHOOSE, elem_id="history")
    gr.HTML(html.heading("Examples", "Click one to take its prompt and size."))
    gallery = gr.HTML(html.cards([], prompts[:EXAMPLES]), js_on_load=html.CHOOSE, elem_id="gallery")
    with gr.Accordion("What this model has learnt", open=False):
        gr.HTML(html.learnt(studio.run.seen))
    fields = {"prompt": prompt, **fields}
    return Layout(fields, tabs, random, message, result, cancel, recipe, history, gallery, clips, shown)


def _settings(studio: Studio) -> tuple[dict[str, Any], gr.Button]:
    """Lay out the settings that all tasks share; return them, and the button for another seed."""
    sampling = studio.run.config.sampling
    sides = list(dict.fromkeys(f"{height} x {width}" for _, height, width in studio.sizes))
    usual, most = usual_frames(studio.run.config), LONG * usual_frames(studio.run.config)
    top = 1 + (most - 1) // studio.factor * studio.factor
    usual_steps = int(sampling.steps) if sampling.steps.isdecimal() else None  # some spacings have lists
    random = gr.Button("random", elem_id="random", render=False)
    with gr.Group():
        with gr.Row():
            about = "height x width; clips that you give keep their shape"
            size = gr.Dropdown(sides, value=sides[0], allow_custom_value=True, label="Size", info=about, elem_id="size")
            about = f"{studio.run.config.preview.fps:g} a second; 1 is an image"
            frames = gr.Slider(
                1, top, usual, step=studio.factor, label="Frames", info=about, buttons=[], elem_id="frames"
            )
        with gr.Row():
            small = dict(min_width=100)
            seed = gr.Number(0, label="Seed", precision=0, buttons=[random], elem_id="seed", **small)
            steps = gr.Number(usual_steps, label="Steps", elem_id="steps", **small)
            guidance = gr.Number(sampling.guidance.scale, label="Guidance", elem_id="guidance", **small)
        about = "what guidance leads away from; may stay empty"
        negative = gr.Textbox(label="Negative prompt", info=about, max_lines=2, elem_id="negative")
    fields = dict(size=size, frames=frames, seed=seed, steps=steps, guidance=guidance, negative=negative)
    return fields, random


def _tabs(studio: Studio) -> dict[str, Tab]:
    tabs, factor = {}, studio.factor
    usual = usual_frames(studio.run.config)
    most = LONG * usual // factor * factor

    def gap(task: str, label: str) -> gr.Slider:
        return gr.Slider(
            factor, most, -(-GAP // factor) * factor, step=factor, label=label, buttons=[], elem_id=f"{task}-gap"
        )

    with gr.Tab("Text"):
        _about("A clip of the prompt alone.")
        tabs["text"] = _tab("text", {}, {}, "Generate")
    with gr.Tab("Image"):
        _about("A clip that begins with a picture; of a clip its first frame is taken.")
        tabs["image"] = _tab("image", {}, {"image": _picker("image")}, "Animate the image")
    with gr.Tab("Extend"):
        _about("More of a clip: what comes after it, or what came before.")
        picker = _picker("video", "extend")
        with gr.Row():
            added = gr.Slider(1, most, GAP, step=1, label=LABELS["extend"], buttons=[], elem_id="extend-frames")
            side = gr.Radio([AFTER, BEFORE], value=AFTER, label="Where", elem_id="extend-side")
        tabs["extend"] = _tab("extend", {"extend": added, "side": side}, {"video": picker}, "Extend the clip")
    with gr.Tab("Loop"):
        _about("A clip without an end: of the prompt alone, or from the end of a clip back to its beginning.")
        picker = _picker("video", "loop")
        tabs["loop"] = _tab("loop", {"gap": gap("loop", "Frames to make")}, {"video": picker}, "Make a loop")
    with gr.Tab("Connect"):
        _about("What lies between two clips of one shape.")
        pickers = {"first": _picker("first"), "second": _picker("second")}
        tabs["connect"] = _tab("connect", {"gap": gap("connect", LABELS["gap"])}, pickers, "Connect the clips")
    with gr.Tab("In-paint"):
        _about("A part of a clip is made anew, the rest stays.")
        picker = _picker("video", "fill")
        area = gr.Radio([*AREAS, WIDER, OWN], value=next(iter(AREAS)), label="What is made anew", elem_id="fill-area")
        with gr.Column(visible=False) as own:
            _about("A picture that is white where the clip is made anew:")
            mask = _picker("mask")
        area.change(lambda area: gr.update(visible=area == OWN), area, own, queue=False, api_visibility="private")
        tabs["fill"] = _tab("fill", {"area": area}, {"video": picker, "mask": mask}, "In-paint")
    with gr.Tab("Edit"):
        _about("Another clip of the same layout. Say what the clip shows now, and only what differs is changed.")
        picker = _picker("video", "edit")
        about = "may stay empty"
        shows = gr.Textbox(label=LABELS["from-prompt"], info=about, max_lines=2, elem_id="edit-from")
        about = "0 keeps the clip, 1 ignores it"
        strength = gr.Slider(
            0, 1, 0.7, step=0.05, label=LABELS["strength"], info=about, buttons=[], elem_id="edit-strength"
        )
        tabs["edit"] = _tab("edit", {"from-prompt": shows, "strength": strength}, {"video": picker}, "Edit the clip")
    with gr.Tab("Long"):
        _about("A clip far longer than those of training, made window by window; it may turn to a second prompt.")
        top, start = 1 + 20 * usual // factor * factor, 1 + 4 * usual // factor * factor
        long = gr.Slider(1, top, start, step=factor, label=LABELS["long"], buttons=[], elem_id="long-frames")
        with gr.Row():
            then = gr.Textbox(label=LABELS["then"], info="the second prompt; may stay empty", elem_id="long-then")
            middle = start // 2 // factor * factor
            at = gr.Slider(factor, top, middle, step=factor, label=LABELS["at"], buttons=[], elem_id="long-at")
        tabs["long"] = _tab("long", {"long": long, "then": then, "at": at}, {}, "Make the long clip")
    return tabs


def _about(text: str) -> None:
    """Say what a tab does; Gradio's Markdown would load a parser for it, which takes longer than the page."""
    gr.HTML(f"<p>{text}</p>")


def _tab(task: str, fields: Mapping[str, Any], pickers: Mapping[str, Picker], button: str) -> Tab:
    chosen = {name: picker.chosen for name, picker in pickers.items()}
    return Tab({**fields, **chosen}, dict(pickers), gr.Button(button, variant="primary", elem_id=f"make-{task}"))


def _picker(field: str, task: str = "") -> Picker:
    name = f"{task or field}-pick"
    chosen = gr.State(None, time_to_live=FORGOTTEN)
    with gr.Column(elem_classes="sora-picker"):
        preview = gr.HTML(html.picked(None), elem_id=f"{name}-preview")
        with gr.Row():
            small = dict(size="sm", min_width=70)
            label = f"Upload {LABELS[field].lower()}"
            upload = gr.UploadButton(label, size="sm", min_width=70, elem_id=f"{name}-upload")
            shown = gr.Button("Shown clip", elem_id=f"{name}-shown", **small)
            example = gr.Button("An example", elem_id=f"{name}-example", **small)
            remove = gr.Button("None", elem_id=f"{name}-none", **small)
    return Picker(chosen, preview, upload, shown, example, remove)
