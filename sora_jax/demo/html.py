"""Write the parts of the page that show clips. Clips are inside the page, so that no file waits on the server."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from sora_jax.demo.fields import Clip
from sora_jax.train.seen import Seen

MIME = {".mp4": "video/mp4", ".png": "image/png", ".gif": "image/gif"}
WORDS = 120  # of the captions of training that are listed

# A card that is clicked tells the server its number. One listener serves all cards that are drawn later.
CHOOSE = """
element.addEventListener('click', event => {
  const card = event.target.closest('[data-number]');
  if (card) trigger('select', {number: Number(card.dataset.number)});
});
"""
DOWNLOAD = "this.href = this.closest('figure').querySelector('[src]').src"

CSS = """
footer {display: none !important}
.gradio-container {max-width: 1180px !important; margin: auto}
.html-container {padding: 0 !important}
.sora-head h1 {font-size: 1.55rem; margin: 0}
.sora-head p, .sora-learnt p, .sora-heading span {margin: .2rem 0; color: var(--body-text-color-subdued)}
button[role="tab"] {padding-left: 10px !important; padding-right: 10px !important}
.sora-heading b {margin-right: .6em}
.sora-clip, .sora-picked img {image-rendering: pixelated}
figure.sora {margin: 0; text-align: center; background: var(--background-fill-secondary); border-radius: 8px;
  padding: 14px; border: 1px solid var(--border-color-primary)}
figure.sora .sora-clip {height: 300px; max-width: 100%; object-fit: contain; margin: auto; border-radius: 4px}
figure.sora figcaption {margin-top: 10px; font-size: .9rem; color: var(--body-text-color-subdued)}
figure.sora a {color: var(--link-text-color); text-decoration: underline; margin-left: .6em}
.sora-empty {height: 300px; display: flex; align-items: center; justify-content: center;
  color: var(--body-text-color-subdued)}
.sora-error, .sora-note {border-radius: 8px; padding: 9px 13px; margin: 2px 0; font-size: .95rem}
.sora-error {background: #fdecea; color: #7a1710; border: 1px solid #f0b4ae}
.sora-note {background: #fff7e0; color: #5c4600; border: 1px solid #ecd690}
.sora-cards {display: flex; flex-wrap: wrap; gap: 10px; align-items: stretch}
#history:not(:has(button)) .sora-cards::before {content: "None yet."; color: var(--body-text-color-subdued)}
.sora-cards button {width: 132px; padding: 8px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary); cursor: pointer; font-size: .8rem; font-weight: 400; line-height: 1.25;
  color: var(--body-text-color); display: flex; flex-direction: column; align-items: center}
.sora-cards button:hover {border-color: var(--color-accent)}
.sora-cards .sora-clip, .sora-cards .sora-none {height: 78px; max-width: 100%; object-fit: contain;
  margin: 0 auto 6px; border-radius: 3px; display: block}
.sora-cards .sora-none {width: 78px; background: var(--background-fill-secondary)}
.sora-picker {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px; gap: 10px}
.sora-picked {min-height: 90px; display: flex; align-items: center; gap: 14px; font-size: .88rem;
  color: var(--body-text-color-subdued)}
.sora-picked img {height: 74px; max-width: 50%; object-fit: contain; border-radius: 3px}
"""


def _source(name: str, data: bytes) -> str:
    return f"data:{MIME[Path(name).suffix]};base64,{base64.b64encode(data).decode()}"


def player(clip: Clip) -> str:
    """Return the element that plays a clip in a loop, without sound, its pixels enlarged without blur."""
    source, name = _source(clip.name, clip.data), html.escape(clip.prompt, quote=True)
    if clip.name.endswith(".png"):
        return f'<img class="sora-clip" alt="{name}" src="{source}">'
    return f'<video class="sora-clip" aria-label="{name}" autoplay loop muted playsinline src="{source}"></video>'


def result(clip: Clip | None) -> str:
    """Return the clip that is shown, with its size and a link to download it."""
    if clip is None:
        return '<figure class="sora"><div class="sora-empty">The clip will play here.</div></figure>'
    frames, height, width = clip.size
    size = f"{frames} frame{'s' * (frames > 1)} of {height} x {width}"
    link = f'<a href="#" download="{html.escape(clip.name)}" onclick="{DOWNLOAD}">Download</a>'
    return f'<figure class="sora">{player(clip)}<figcaption>{size}{link}</figcaption></figure>'


def error(sentence: str) -> str:
    """Return the box that says what is wrong."""
    return f'<div class="sora-error" role="alert">{html.escape(sentence)}</div>'


def notes(lines: Sequence[str]) -> str:
    """Return boxes of what a visitor should know; "" for nothing."""
    return "".join(f'<div class="sora-note" role="status">{html.escape(line)}</div>' for line in dict.fromkeys(lines))


def cards(clips: Sequence[Clip], prompts: Sequence[str]) -> str:
    """Return a card for each prompt, with its clip where there is one; a click tells its number."""
    pictures = [player(clip) for clip in clips] + ['<div class="sora-none"></div>'] * (len(prompts) - len(clips))
    items = [f'<button data-number="{number}">{picture}{html.escape(prompt)}</button>'
             for number, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True))]  # fmt: skip
    return f'<div class="sora-cards">{"".join(items)}</div>'


def picked(clip: Clip | None, preview: bytes = b"") -> str:
    """Return what was chosen as an input, as the run takes it."""
    if clip is None:
        return '<div class="sora-picked">Nothing is chosen yet.</div>'
    frames, height, width = clip.size
    about = f"{html.escape(clip.name)}<br>{frames} frame{'s' * (frames > 1)}, taken as {height} x {width}"
    return f'<div class="sora-picked"><img alt="" src="{_source("x.gif", preview)}"><div>{about}</div></div>'


def head(name: str, step: int) -> str:
    """Return the title of the page."""
    about = (
        f"The model <b>{html.escape(name)}</b>, after {step:,} steps of training, makes clips of what a prompt says."
    )
    return f'<div class="sora-head"><h1>Text to video with sora_jax</h1><p>{about}</p></div>'


def heading(title: str, about: str) -> str:
    """Return the heading of a row of clips."""
    return f'<div class="sora-heading"><b>{title}</b> <span>{about}</span></div>'


def learnt(seen: Seen | None) -> str:
    """Return what the run was trained on: sizes and words."""
    if seen is None:
        return '<div class="sora-learnt"><p>What this model was trained on is not known.</p></div>'
    words = ", ".join(map(html.escape, seen.words[:WORDS])) + (", ..." if len(seen.words) > WORDS else "")
    about = f"It was trained on clips of {seen.sizes}. Sizes far from these give poor clips."
    return f'<div class="sora-learnt"><p>{about}</p><p>It knows these words: {words}.</p></div>'
