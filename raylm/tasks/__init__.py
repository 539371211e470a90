"""Tasks of lm-evaluation-harness: how often a model chooses the right answer, or writes it.

catalog       names and paths -> tasks that lm-eval knows, and those of one's own files; their data loaded
requests      what a task asks of a model -> windows of tokens to score
answers       the workers' part: windows -> likelihoods, prompts -> texts
run           a model and tasks -> the metrics of each
"""

from raylm.tasks.catalog import ChosenTasks, choose
from raylm.tasks.run import Scored, TaskScore, run

__all__ = ["ChosenTasks", "Scored", "TaskScore", "choose", "run"]
