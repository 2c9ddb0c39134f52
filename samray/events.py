"""Events on their way from a run's workers to the process that started them.

Without torch, which takes the queue's process seconds of a CPU while the workers start.
"""

from typing import Any

import ray


@ray.remote
class EventQueue:
    """Keeps events until they are taken."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def put(self, event: dict[str, Any]) -> None:
        """Add one event."""
        self.events.append(event)

    def take(self) -> list[dict[str, Any]]:
        """Return and remove all events."""
        events, self.events = self.events, []
        return events


def send(queue: Any, event: dict[str, Any]) -> None:
    """Add an event to a queue, without waiting for it."""
    queue.put.remote(event)
