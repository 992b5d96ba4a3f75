"""Take the screenshots of docs/demo.md: `python experiments/demo/screenshots.py [RUN]`, with Debian's Chromium.

It needs the extras [demo] and [browser].
"""

import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from sora_jax import cli
from sora_jax.demo.serve import Address, open_studio, served
from sora_jax.files import as_path

HERE = Path(__file__).parent
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 300_000  # milliseconds


def make(page: Page, button: str) -> None:
    """Press a button and wait for its clip."""
    before = page.input_value("#recipe textarea")
    page.click(button)
    page.wait_for_function("before => document.querySelector('#recipe textarea').value != before", arg=before)
    page.wait_for_timeout(1000)


def save(page: Page, name: str, height: int) -> None:
    """Save the top of the page, in few colours."""
    file = HERE / f"{name}.png"
    page.screenshot(path=file, clip={"x": 0, "y": 0, "width": 1240, "height": height}, full_page=True)
    Image.open(file).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Take a picture of a clip of text, of a task, and of a wrong field."""
    studio = open_studio(as_path(sys.argv[1]) if sys.argv[1:] else None, cli.parsed)
    with served(studio, Address(port=7899)) as url, sync_playwright() as library:
        browser = library.chromium.launch(executable_path="/usr/bin/chromium", args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1240, "height": 1000})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.wait_for_selector("#gallery .sora-clip")
        page.fill("#prompt textarea", "a blue square moves up on a plain grey background")
        make(page, "#make-text")
        save(page, "text", 1080)
        page.get_by_role("tab", name="Extend", exact=True).click()
        page.click("#extend-pick-shown")
        page.wait_for_selector("#extend-pick-preview img")
        make(page, "#make-extend")
        save(page, "extend", 860)
        page.get_by_role("tab", name="Text", exact=True).click()
        page.fill("#prompt textarea", "a crimson sphere moves up")
        page.fill("#size input", "25 x 36")
        page.press("#size input", "Tab")
        page.click("#make-text")
        page.wait_for_selector("#message .sora-error")
        page.wait_for_timeout(500)
        save(page, "wrong", 480)
        browser.close()


if __name__ == "__main__":
    main()
