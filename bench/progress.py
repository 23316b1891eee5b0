"""What is going on: a bar on a terminal, a line per step of tenths elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """One bar at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = RichProgress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console, transient=True
        )
        self._task = self._bars.add_task("", total=None)
        self._said = ""

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bars.stop()

    def say(self, what: str) -> None:
        """Something without steps begins."""
        self._show(what, None, None)

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total`."""
        self._show(what, done, total)

    def _show(self, what: str, done: int | None, total: int | None) -> None:
        if self._console.is_terminal:
            self._bars.update(self._task, description=what, completed=done or 0, total=total)
        elif what != self._said:
            self._console.print(f"  {what} …", style="dim")
        self._said = what
