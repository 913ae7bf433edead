"""Small real tasks for the demonstrations: generated in seconds, learned in minutes on a CPU."""

from plait.quickstart.tasks.home import home_task
from plait.quickstart.tasks.reasoning import REASONING
from plait.quickstart.tasks.task import Task, prompt, reference

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        home_task("en", "English home commands to JSON function calls"),
        home_task("de", "German home commands to JSON function calls"),
        REASONING,
    )
}

__all__ = ["TASKS", "Task", "prompt", "reference"]
