"""Progress on standard error: bars on a terminal, lines elsewhere, each with an estimate of the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

Progress = Callable[[str, int, int], None]
Clock = Callable[[], float]
_SECONDS_BETWEEN_LINES = 1.0


@contextmanager
def shown(*, quiet: bool) -> Iterator[Progress]:
    """What to give a run as `progress`: it shows stages while the context is open.

    A stage may start with some items already done, by a run that was interrupted.
    """
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield Bars(bars)
    else:
        yield Lines()


class Pace:
    """The time left of one stage, judged by the items finished since its first report."""

    def __init__(self, done: int, now: float) -> None:
        self._done, self._start = done, now

    def left(self, done: int, total: int, now: float) -> str:
        """`1m20s`, or nothing while it cannot be known."""
        if done <= self._done or done >= total:
            return ""
        return duration((total - done) * (now - self._start) / (done - self._done))


class Lines:
    """Plain lines, `observe 3/4, eta 1m20s`: never two for one item, and at most one a second within a stage."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._done, self._written = "", -1, 0.0
        self._pace = Pace(0, 0.0)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Told of a stage, what is done of it, and of how much."""
        now, is_new = self._clock(), stage != self._stage
        if is_new:
            self._stage, self._pace = stage, Pace(done, now)
        elif done == self._done or (done < total and now - self._written < _SECONDS_BETWEEN_LINES):
            return
        self._done, self._written = done, now
        left = self._pace.left(done, total, now)
        click.echo(f"{stage} {done}/{total}{f', eta {left}' if left else ''}", err=True)


class Bars:
    """One bar a stage."""

    def __init__(self, bars: RichProgress, clock: Clock = time.monotonic) -> None:
        self._bars, self._clock = bars, clock
        self._tasks: dict[str, tuple[TaskID, Pace]] = {}
        self._waiting: TaskID | None = bars.add_task("starting", total=None, left="")

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Told of a stage, what is done of it, and of how much."""
        now = self._clock()
        if self._waiting is not None:
            self._bars.remove_task(self._waiting)
            self._waiting = None
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total, completed=done, left=""), Pace(done, now)
        task, pace = self._tasks[stage]
        left = pace.left(done, total, now)
        self._bars.update(task, completed=done, total=total, left=f"eta {left}" if left else "")


def _bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        # Rich's own estimate forgets items that took longer than half a minute, and those of large models all do.
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
    )


def duration(seconds: float) -> str:
    """`45s`, `1m20s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02}m"
