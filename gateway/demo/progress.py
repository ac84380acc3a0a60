"""How far a replay has come: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.agent_trace import AgentTrace
from gateway.demo.client import TaskResult

# Between two lines where there is no terminal.
LINE_EVERY_S = 5.0


class ReplayProgress:
    """A `Watcher` that shows the progress of one replay."""

    def __init__(
        self, console: Console, title: str, agents: Sequence[AgentTrace], details: Callable[[], str] = lambda: ""
    ) -> None:
        """`details` is called whenever something is shown, for a text beside it."""
        self._console = console
        self._title = title
        self._details = details
        self._agents, self._tasks = len(agents), sum(len(agent.tasks) for agent in agents)
        self.outstanding = 0  # tasks that were sent and have not ended
        self._agents_done = self._tasks_done = self._failed = 0
        self._line_at = time.monotonic() + LINE_EVERY_S
        self._progress = Progress(
            TextColumn("{task.description:>18}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[details]}"),
            console=console,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )

    @contextlib.contextmanager
    def shown(self) -> Iterator[ReplayProgress]:
        with self._progress:
            self._agents_bar = self._progress.add_task(self._title, total=self._agents, unit="agents", details="")
            self._tasks_bar = self._progress.add_task("", total=self._tasks, unit="tasks", details="")
            yield self
            self._progress.update(self._tasks_bar, details="")
        if not self._console.is_terminal:
            self._say()

    def task_sent(self) -> None:
        self.outstanding += 1

    def task_ended(self, result: TaskResult) -> None:
        self.outstanding = max(0, self.outstanding - 1)
        self._tasks_done += 1
        self._failed += result.error is not None
        self._progress.update(self._tasks_bar, advance=1, details=self._and_failed())
        if not self._console.is_terminal and time.monotonic() >= self._line_at:
            self._line_at = time.monotonic() + LINE_EVERY_S
            self._say()

    def agent_ended(self, agent_id: str) -> None:
        self._agents_done += 1
        self._progress.update(self._agents_bar, advance=1)

    def _say(self) -> None:
        self._console.print(
            f"{self._title}: {self._agents_done} of {self._agents} agents, {self._tasks_done} of {self._tasks} tasks"
            f"{', ' if self._and_failed() else ''}{self._and_failed()}"
        )

    def _and_failed(self) -> str:
        failed = f"{self._failed} failed" if self._failed else ""
        return ", ".join(filter(None, (failed, self._details())))
