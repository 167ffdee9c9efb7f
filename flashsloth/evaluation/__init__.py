"""``flashsloth eval``: questions with known answers, asked one by one, scored by exact match."""

from flashsloth.evaluation.running import Result, evaluate
from flashsloth.evaluation.scoring import Score, normalise, score_kinds, wilson
from flashsloth.evaluation.tasks import Question, Task, file_task, folder_task, generated_task

__all__ = [
    "Question",
    "Result",
    "Score",
    "Task",
    "evaluate",
    "file_task",
    "folder_task",
    "generated_task",
    "normalise",
    "score_kinds",
    "wilson",
]
