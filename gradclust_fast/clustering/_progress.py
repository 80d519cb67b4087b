"""A progress bar on standard error, when rich is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[str], None]


@contextmanager
def progress_bar(show: bool | None, total: int) -> Iterator[Advance]:
    """Yields ``advance(text)``, one step of ``total``. ``show`` None: only with rich installed and on a terminal."""
    installed = importlib.util.find_spec("rich") is not None
    if show and not installed:
        raise ImportError("progress=True needs rich; pip install rich, or leave progress out")
    if show is None:
        show = installed and sys.stderr.isatty()
    if not show:
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, advance=1, description=text)
