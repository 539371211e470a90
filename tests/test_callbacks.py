"""train.callbacks: classes of the user's own in the Trainer."""

import sys

import pytest

from raylm import config
from raylm import plan as plans
from raylm.errors import ConfigError

OWN = """
from own.steps import note
from transformers import TrainerCallback

class Steps(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        note(state.global_step)

class NoCallback:
    pass
"""

STEPS = """
def note(step):
    with open({file!r}, "a") as file:
        file.write(f"{{step}}\\n")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The file that the callback of a package in the working directory writes each step to."""
    file = tmp_path / "steps.txt"
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").touch()
    (tmp_path / "own" / "callbacks.py").write_text(OWN)
    (tmp_path / "own" / "steps.py").write_text(STEPS.format(file=str(file)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield file
    for name in ("own", "own.callbacks", "own.steps"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_callback_of_the_working_directory_is_called_in_every_worker(own, tiny, command, tmp_path, workers):
    experiment = tiny(
        f"storage={tmp_path}/runs", "train.callbacks=own.callbacks:Steps", f"cluster.num_workers={workers}"
    )
    config.save(experiment, tmp_path / "own.yaml")
    ended = command("train", "--config", tmp_path / "own.yaml", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    steps = [int(line) for line in own.read_text().split()]
    assert sorted(steps) == sorted([*range(1, 11)] * workers)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "own.missing:Steps",
            "own.missing:Steps cannot be imported: ModuleNotFoundError: No module named 'own.missing'",
        ),
        ("own.callbacks:Step", "own.callbacks:Step cannot be imported: AttributeError: .*has no attribute 'Step'"),
        ("own.callbacks:NoCallback", "must be a subclass of transformers.TrainerCallback"),
    ],
)
def test_what_is_no_callback_is_refused_in_the_plan(own, tiny, name, problem):
    with pytest.raises(ConfigError, match=rf"^train.callbacks: .*{problem}"):
        plans.resolve(tiny(f"train.callbacks={name}"))


def test_a_name_without_a_class_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"train\.callbacks"):
        tiny("train.callbacks=own.callbacks")
