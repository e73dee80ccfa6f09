"""One file per task: its run's config, data, model, evaluation and samples."""

from ..config import TrainConfig
from .base import Metric, Row, Task
from .causal_lm import CausalLMTask
from .dit import DiTTask
from .masked_lm import MaskedLMTask
from .recurrent import RecurrentTask
from .vit import ViTTask

__all__ = ["TASKS", "Metric", "Task", "task_of"]

TASKS: dict[str, type[Task]] = {
    "causal_lm": CausalLMTask,
    "masked_lm": MaskedLMTask,
    "recurrent": RecurrentTask,
    "dit": DiTTask,
    "vit": ViTTask,
}


def task_of(config: TrainConfig, facts: Row | None = None) -> Task:
    """Return the config's task. facts: those that its run stored, so that its data need not be there."""
    return TASKS[config.architecture](config, facts)
