"""What a run shows: bars on a terminal (with rich), else one line a finished unit."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def display(total: int) -> Iterator[Callable[[str, Any, Any], None]]:
    """Yields ``show(kind, task, content)`` for a run of ``total`` units."""
    titles: dict[Any, str] = {}
    finished = 0

    def line(kind: str, task: Any, content: Any, write: Callable[[str], Any]) -> None:
        nonlocal finished
        if kind == "start":
            titles[task] = content
        elif kind == "done":
            finished += 1
            fate = "" if content["status"] == "finished" else f"  {content['status'].upper()}: {content['message']}"
            write(f"[{finished}/{total}] {titles[task]}  {content['seconds']:.0f} s{fate}")
        elif kind == "failed":
            finished += 1
            write(f"[{finished}/{total}] {titles.get(task, task)}  FAILED\n{content}")

    if importlib.util.find_spec("rich") is None or not sys.stderr.isatty():
        yield lambda kind, task, content: line(kind, task, content, lambda text: print(text, flush=True))
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        overall = bars.add_task("all units", total=total, text=f"0 of {total}")
        own: dict[Any, Any] = {}

        def show(kind: str, task: Any, content: Any) -> None:
            line(kind, task, content, lambda text: bars.console.print(text, markup=False, highlight=False))
            if kind == "start":
                own[task] = bars.add_task(content, total=1.0, text="")
            elif kind == "progress" and task in own:
                bars.update(own[task], completed=content[0], text=content[1])
            elif kind in ("done", "failed"):
                if task in own:
                    bars.remove_task(own.pop(task))
                bars.update(overall, advance=1, text=f"{finished} of {total}")

        yield show
