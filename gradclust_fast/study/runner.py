"""Runs units, one after the other or in several processes, and gathers their results into a row's table."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .. import data as datasets
from .._files import write_atomically
from .progress import display
from .row import Row, Variant, all_rows
from .table import Table
from .unit import Options, Unit

Task = tuple[str, int, int]
"""(row id, position of the variant, seed)."""

Emit = Callable[[str, Task, Any], None]
"""``emit(kind, task, content)``: "start" (a title), "progress" (fraction, text), "done" (a dict), "failed" (a text)."""


def run_rows(rows: Sequence[Row], options: Options, seeds: Sequence[int], *, jobs: int = 1, threads: int = 1) -> int:
    """Measures what is not finished yet, writes each row's CSV, and returns the number of units that failed.

    A unit that another row has measured already, or an earlier run, is not measured again; an interrupted one goes on
    from its last checkpoint, to the result that it would have had.

    Args:
        rows: of :func:`all_rows`, or with ``jobs=1`` any others.
        seeds: one trajectory each.
        jobs: processes. threads: of torch in each; results may differ in their last bits with the number of threads.
    """
    tasks = plan(rows, options, seeds)
    total = len({(v.family, v.name, seed) for row in rows for v in row.variants(options.scale) for seed in seeds})
    if total > len(tasks):
        print(f"{total - len(tasks)} of {total} measurements are there already")
    for row in rows:
        gather(row, options, seeds)
    failed: list[Task] = []
    with display(len(tasks)) as show:

        def emit(kind: str, task: Task, content: Any) -> None:
            show(kind, task, content)
            if kind == "failed":
                failed.append(task)
            if kind == "done":
                for row in rows:
                    if has_unit(row, rows, task, options):
                        gather(row, options, seeds)

        if jobs == 1 or len(tasks) <= 1:
            in_turn({row.id: row for row in rows}, tasks, options, threads, emit)
        else:
            in_parallel(tasks, options, min(jobs, len(tasks)), threads, emit)
    return len(failed)


def plan(rows: Sequence[Row], options: Options, seeds: Sequence[int]) -> list[Task]:
    """Tasks without a result, those of one seed together, each unit once."""
    tasks: dict[tuple[str, str, int], Task] = {}
    for seed in seeds:
        for row in rows:
            for position, variant in enumerate(row.variants(options.scale)):
                if Unit(variant, seed, options).result() is None:
                    tasks.setdefault((variant.family, variant.name, seed), (row.id, position, seed))
    return list(tasks.values())


def has_unit(row: Row, rows: Sequence[Row], task: Task, options: Options) -> bool:
    """Whether a row uses a task's unit, its own or another row's."""
    own = next(each for each in rows if each.id == task[0]).variants(options.scale)[task[1]]
    return any((v.family, v.name) == (own.family, own.name) for v in row.variants(options.scale))


def gather(row: Row, options: Options, seeds: Sequence[int]) -> Table:
    """The row's finished units as a table, written to its CSV, with the units' times and fates beside it.

    Seeds that an earlier run has measured count as well.
    """
    records: list[dict[str, Any]] = []
    units = []
    variants = row.variants(options.scale)
    seeds = sorted({*seeds, *(seed for variant in variants for seed in measured_seeds(variant, options))})
    for variant in variants:
        for seed in seeds:
            result = Unit(variant, seed, options).result()
            if result is None:
                continue
            own = {**variant.labels, "seed": seed, "status": result["status"]}
            records += [{**own, **record} for record in result["records"]]
            units.append({key: result[key] for key in ("variant", "seed", "status", "message", "seconds")})
    table = Table(records)
    if units:
        table.write(options.out / f"{row.stem}.csv")
        about = {
            "row": row.id,
            "scale": options.scale,
            "seeds": list(seeds),
            "expected": len(seeds) * len(variants),
            "seconds": round(sum(unit["seconds"] for unit in units), 1),
            "units": units,
        }
        write_atomically(options.out / f"{row.stem}.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return table


def measured_seeds(variant: Variant, options: Options) -> list[int]:
    pattern = Unit(variant, 0, options).path.name.replace("-seed0.json", "-seed*.json")
    folder = Unit(variant, 0, options).path.parent
    found = [int(path.stem.rpartition("-seed")[2]) for path in folder.glob(pattern)]
    return [seed for seed in found if Unit(variant, seed, options).result() is not None]


def missing_data(row: Row, options: Options) -> str | None:
    """What keeps a row from its data sets, or None. Every file that it will read is opened."""
    needs = row.needs(options.scale)
    if options.own_data:
        if row.model or not needs:
            return None
        return f"it measures {', '.join(needs)}; --data must be the directory that holds the files"
    for name in needs:
        for split in datasets.SPLITS:
            try:
                datasets.load(name, split, data=options.data, limit=1)
            except (FileNotFoundError, ModuleNotFoundError, ValueError) as error:
                return str(error)
    return None


def execute(row: Row, task: Task, options: Options, emit: Emit) -> None:
    variant = row.variants(options.scale)[task[1]]
    emit("start", task, f"{row.id}  {variant.name}  seed {task[2]}")
    unit = Unit(variant, task[2], options, lambda fraction, text: emit("progress", task, (fraction, text)))
    try:
        result = unit.execute()
    except Exception:
        emit("failed", task, traceback.format_exc())
    else:
        emit("done", task, {key: result[key] for key in ("status", "message", "seconds")})


def in_turn(rows: dict[str, Row], tasks: Sequence[Task], options: Options, threads: int, emit: Emit) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for task in tasks:
            execute(rows[task[0]], task, options, emit)
    finally:
        torch.set_num_threads(before)


def in_parallel(tasks: Sequence[Task], options: Options, jobs: int, threads: int, emit: Emit) -> None:
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half alive
    events, waiting = context.Queue(), list(reversed(tasks))
    workers: dict[int, Any] = {}  # slot → (process, its task queue)
    running: dict[int, Task] = {}
    dead: list[Task] = []

    def start(slot: int) -> None:
        own = context.SimpleQueue()
        process = context.Process(target=_work, args=(slot, own, events, options, threads, os.getpid()), daemon=True)
        process.start()
        workers[slot] = process, own

    def feed(slot: int) -> None:
        running.pop(slot, None)
        if waiting:
            running[slot] = waiting.pop()
            workers[slot][1].put(running[slot])

    for slot in range(jobs):
        start(slot)
        feed(slot)
    try:
        while running:
            try:
                slot, kind, task, content = events.get(timeout=1.0)
            except queue.Empty:
                for slot in [s for s in running if not workers[s][0].is_alive()]:
                    code = workers[slot][0].exitcode
                    dead.append(running[slot])
                    emit("failed", running[slot], f"its process ended with exit code {code} (out of memory?)")
                    start(slot)
                    feed(slot)
                continue
            if running.get(slot) != task:
                continue  # of a process that died after sending it
            emit(kind, task, content)
            if kind in ("done", "failed"):
                feed(slot)
    finally:
        for process, _ in workers.values():
            process.terminate()


def _work(slot: int, tasks: Any, events: Any, options: Options, threads: int, parent: int) -> None:
    """A worker process: tasks until it is terminated, or the runner is gone."""
    torch.set_num_threads(threads)
    rows = all_rows()

    def emit(kind: str, task: Task, content: Any) -> None:
        if os.getppid() != parent:
            os._exit(1)  # the runner was killed: what the last checkpoint holds will be found by the next one
        events.put((slot, kind, task, content))

    while True:
        task = tasks.get()
        execute(rows[task[0]], task, options, emit)
