"""Serve the page with Gradio, on this machine alone unless asked otherwise, and without the network."""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_jax.config import check
from sora_jax.demo.fields import Limits
from sora_jax.demo.studio import Parse, Studio
from sora_jax.errors import UserError, install_command
from sora_jax.files import as_path
from sora_jax.generate.run import load_run, read_run_config
from sora_jax.train.exported import USUAL, run_folder

SESSIONS = 64  # visits whose clips are kept in memory; beyond, those of the oldest are dropped
FONTS = ["system-ui", "sans-serif"]


@dataclass(frozen=True)
class Address:
    """Say where the page is served."""

    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False  # through a tunnel of Gradio's, for 72 hours
    open: bool = False  # in a browser of this machine


def serve(workdir: Path | None, parse: Parse, address: Address = Address(), limits: Limits = Limits()) -> None:
    """Serve the page of a run until the process is interrupted.

    Raises:
        UserError: Gradio is missing, the address cannot be had, or the folder is no run of text to video.
    """
    check_address(address)
    check_gradio()
    studio = open_studio(workdir, parse, limits)
    with served(studio, address) as url:
        print(f"sora-jax: the page is at {url} (Ctrl-C ends it)", file=sys.stderr)
        threading.Event().wait()


def open_studio(workdir: Path | None, parse: Parse, limits: Limits = Limits()) -> Studio:
    """Load a run for the page; None: the model that comes with the package."""
    given = as_path(USUAL) if workdir is None else workdir
    name = given.name if given.is_absolute() else str(given)
    folder = run_folder(workdir)
    read_run_config(folder)  # a UserError that names the option
    return Studio(load_run(folder), name, folder, parse, limits)


@contextlib.contextmanager
def served(studio: Studio, address: Address = Address()):
    """Serve the page of a studio while the context lasts; yield its address."""
    folder = tempfile.mkdtemp(prefix="sora-jax-page-")  # of uploads, until they are read
    os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
    import gradio as gr

    from sora_jax.demo.html import CSS
    from sora_jax.demo.page import build

    page = build(studio).queue(max_size=studio.limits.queue)
    quiet: dict[str, Any] = dict(quiet=True, show_error=False, run_history=False, enable_monitoring=False)
    plain: dict[str, Any] = dict(footer_links=[], ssr_mode=False, pwa=False, mcp_server=False, inline=False)
    theme = gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "monospace"]
    )
    try:
        _, url, shared = page.launch(
            server_name=address.host, server_port=address.port, share=address.share, inbrowser=address.open,
            prevent_thread_lock=True, max_file_size=f"{studio.limits.megabytes}mb", theme=theme, css=CSS,
            state_session_capacity=SESSIONS, **quiet, **plain,
        )  # fmt: skip
        threading.Thread(target=studio.prepare, daemon=True, name="examples").start()
        yield shared or url
    finally:
        page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


def check_gradio() -> None:
    """Raise a UserError where Gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        missing = "gradio is not installed; it must be, for the page"
        raise UserError(f"{missing}: {install_command('demo')}") from error


def check_address(address: Address) -> None:
    """Raise a UserError where the host has no such name, or the port is taken."""
    check(0 < address.port < 65536, f"--port is {address.port}; it must be from 1 to 65535")
    try:
        family, *_ = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"--host is {address.host!r}; it must be an address of this machine: {error}") from error
    with socket.socket(family, socket.SOCK_STREAM) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address.host, address.port))
        except PermissionError as error:
            raise UserError(f"--port is {address.port}; it must be 1024 or more for this user") from error
        except OSError as error:
            taken = f"--port is {address.port}; another program has it on {address.host}"
            raise UserError(f"{taken}: it must be a free one, such as {address.port + 1}") from error
