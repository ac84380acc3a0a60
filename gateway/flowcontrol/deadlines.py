"""How long tasks may wait: which of them have waited for too long, and when the next one will have."""

from __future__ import annotations

from collections import OrderedDict

from gateway.flowcontrol.fairqueue import TaskId
from gateway.flowcontrol.settlement import LiveTask


class Deadlines:
    """The tasks that wait, by the seconds that each had left when it came to wait; of equal ones the first to come has the
    earliest deadline."""

    def __init__(self) -> None:
        self.waiting: dict[float, OrderedDict[TaskId, LiveTask]] = {}

    def add(self, task: LiveTask, max_queue_s: float) -> None:
        """The task waits from `since_s` on; it may wait for so long, in all."""
        task.max_queue_s = max_queue_s
        self.waiting.setdefault(task.left_s, OrderedDict())[task.id] = task

    def remove(self, task: LiveTask) -> None:
        """The task does not wait any more. Does nothing for one that has expired."""
        if (tasks := self.waiting.get(task.left_s)) is not None:
            tasks.pop(task.id, None)
            if not tasks:
                del self.waiting[task.left_s]

    def expired(self, now_s: float) -> list[LiveTask]:
        """The tasks that have waited for as long as they may. Each is named once."""
        found: list[LiveTask] = []
        for left_s, tasks in self.waiting.items():
            for task in tasks.values():
                if now_s - task.since_s < left_s:
                    break
                found.append(task)
        for task in found:
            self.remove(task)
        return found

    @property
    def next_s(self) -> float | None:
        """When, on the monotonic clock, the next task will have waited for too long. None while none waits."""
        return min((next(iter(tasks.values())).expires_s for tasks in self.waiting.values()), default=None)
