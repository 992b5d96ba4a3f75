"""Connect the buttons of the page with the studio. Nothing that fails here shows a traceback to a visitor."""

import functools
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from sora_jax.demo import html
from sora_jax.demo.fields import Clip
from sora_jax.demo.layout import RANDOM, Layout, Picker, Tab, lay_out
from sora_jax.demo.studio import EXAMPLES, Cancelled, Studio, preview_of
from sora_jax.errors import UserError

KEPT = 12  # clips of a visit that stay on the page
BUG = "Something went wrong on the server, whose log says what. Try it again, or something else."
LATER = "The examples are still being made; try again in a moment"
NONE = "This model has no examples; upload a clip, or make one first"
HIDDEN: dict[str, Any] = dict(api_visibility="private")
QUICK: dict[str, Any] = dict(show_progress="hidden", queue=False, **HIDDEN)  # events that take no turn
READING: dict[str, Any] = dict(
    show_progress="hidden", concurrency_id="reading", concurrency_limit=2, **HIDDEN
)  # of files
Updates = dict[Any, Any]  # component -> its new value


def build(studio: Studio) -> gr.Blocks:
    """Build the page of a run."""
    with gr.Blocks(title="sora_jax", analytics_enabled=False, delete_cache=(600, 600)) as page:
        parts = lay_out(studio)
        events = [_connect_tab(studio, parts, task, tab) for task, tab in parts.tabs.items()]
        for tab in parts.tabs.values():
            for field, picker in tab.pickers.items():
                _connect_picker(studio, parts, field, picker)
        _connect_cards(studio, parts)
        parts.random.click(None, None, parts.fields["seed"], js=RANDOM, **HIDDEN)
        _connect_cancel(studio, parts, events, page)
        page.load(
            lambda: _gallery(studio), None, parts.gallery, show_progress="hidden", concurrency_limit=None, **HIDDEN
        )
    return page


def _shielded(parts: Layout, work: Callable[[], Updates]) -> Updates:
    """Return what `work` returns, or the sentence of what went wrong."""
    try:
        return work()
    except UserError as error:
        return {parts.message: html.error(str(error))}
    except Cancelled:
        return {parts.message: html.notes(["Cancelled."])}
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return {parts.message: html.error(BUG)}


def _connect_tab(studio: Studio, parts: Layout, task: str, tab: Tab) -> Any:
    """Let the button of a tab make a clip; return the event."""
    fields = {**parts.fields, **tab.fields}

    def make(data: dict, request: gr.Request, progress=gr.Progress()) -> Updates:
        def work() -> Updates:
            values = {name: data[component] for name, component in fields.items()}
            tell = functools.partial(_tell, progress)
            clip = studio.make(task, values, request.session_hash or "", tell)
            clips = [clip, *data[parts.clips]][:KEPT]
            cards = html.cards(clips, [clip.prompt for clip in clips])
            return {**_show(parts, clip), parts.clips: clips, parts.history: cards}

        return _shielded(parts, work)

    outputs = [parts.message, parts.result, parts.recipe, parts.shown, parts.clips, parts.history]
    triggers = [tab.button.click] + ([parts.fields["prompt"].submit] if task == "text" else [])
    inputs = {*fields.values(), parts.clips}
    progress = dict(show_progress_on=parts.result, concurrency_limit=1, concurrency_id="sampling")
    return gr.on(triggers, make, inputs, outputs, **progress, **HIDDEN)


def _tell(progress: gr.Progress, done: int, total: int) -> None:
    """Show how far the clip is."""
    progress((done, total), desc="sampling" if done else "preparing", unit="steps")


def _show(parts: Layout, clip: Clip) -> Updates:
    """Show a clip, how it is made again, and what was said of it."""
    return {parts.message: html.notes(clip.notes), parts.result: html.result(clip), parts.recipe: clip.command,
            parts.shown: clip}  # fmt: skip


def _connect_picker(studio: Studio, parts: Layout, field: str, picker: Picker) -> None:
    """Let the buttons of an input choose a clip."""
    prompt = parts.fields["prompt"]
    outputs = [picker.chosen, picker.preview, parts.message]

    def choose(clip: Clip) -> Updates:
        return {picker.chosen: clip, picker.preview: html.picked(clip, preview_of(clip)), parts.message: ""}

    def upload(path: str) -> Updates:
        def work() -> Updates:
            file = Path(path)
            data = file.read_bytes()
            file.unlink()  # the clip is kept with the visit
            return choose(studio.pick(file.name, data, field))

        return _shielded(parts, work)

    def shown(clip: Clip | None) -> Updates:
        if clip is None:
            return {parts.message: html.error("There is no clip yet; make one first, or take an example")}
        return _shielded(parts, lambda: choose(clip))

    def example() -> Updates:
        if not studio.examples:
            return {parts.message: html.error(NONE if studio.ready.is_set() else LATER)}
        clip = random.choice([clip for clip in studio.examples if clip.size[0] > 1] or studio.examples)
        return _shielded(parts, lambda: {**choose(clip), prompt: clip.prompt})

    picker.upload.upload(upload, picker.upload, outputs, **READING)
    picker.shown.click(shown, parts.shown, outputs, **READING)
    picker.example.click(example, None, [*outputs, prompt], **READING)
    picker.remove.click(lambda: (None, html.picked(None), ""), None, outputs, **QUICK)


def _connect_cards(studio: Studio, parts: Layout) -> None:
    """Let a click on a card show its clip; an example fills the prompt and the size, too."""
    outputs = [parts.message, parts.result, parts.recipe, parts.shown]

    def again(clips: list[Clip], event: gr.EventData) -> Updates:
        if event.number >= len(clips):
            return {parts.message: html.error("This clip is forgotten; make it again")}
        return _shielded(parts, lambda: _show(parts, clips[event.number]))

    def example(event: gr.EventData) -> Updates:
        prompt, (frames, height, width) = studio.prompts[event.number]
        shown = _show(parts, studio.examples[event.number]) if event.number < len(studio.examples) else {}
        size = {parts.fields["size"]: f"{height} x {width}", parts.fields["frames"]: frames}
        return {parts.fields["prompt"]: prompt, **size, **shown}

    parts.history.select(again, parts.clips, outputs, **QUICK)
    fields = [parts.fields[name] for name in ("prompt", "size", "frames")]
    parts.gallery.select(example, None, [*fields, *outputs], **QUICK)


def _connect_cancel(studio: Studio, parts: Layout, events: list[Any], page: gr.Blocks) -> None:
    """Let the button and the end of a visit cancel what is made."""

    def cancel(request: gr.Request) -> str:
        studio.cancel(request.session_hash or "")
        return html.notes(["Cancelled."])

    def leave(request: gr.Request) -> None:
        studio.cancel(request.session_hash or "")

    parts.cancel.click(cancel, None, parts.message, cancels=events, **QUICK)
    page.unload(leave)


def _gallery(studio: Studio) -> str:
    """Return the cards of the examples when they are made."""
    studio.ready.wait()
    prompts = [prompt for prompt, _ in studio.prompts[:EXAMPLES]]
    return html.cards(studio.examples, prompts)
