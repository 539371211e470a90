"""Other tools' keys are told as settings, and docs/coming-from.md says the same as the errors do."""

import re
from pathlib import Path

import pytest

from raylm import config
from raylm.config.names import OTHERS, OWNED, SAME, meant_by, settings_named
from raylm.config.sections import section_of
from raylm.errors import ConfigError

PAGE = (Path(__file__).parents[1] / "docs" / "coming-from.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \| ?([^|]*)\|$", PAGE, re.MULTILINE)
ROWS = [(re.findall(r"`([^`]+)`", keys), re.findall(r"`([^`]+)`", settings), note) for keys, settings, note in ROWS]
KEYS = [(key, settings) for keys, settings, _ in ROWS for key in keys]


def settings_in(text):
    """The settings that a text names, in the order in which it does."""
    sections = "|".join(config.Experiment.model_fields)
    return re.findall(rf"\b(?:storage|(?:{sections})(?:\.\w+)+)\b", text)


def is_setting(key):
    section, (*parents, last) = config.Experiment, key.split(".")
    for part in parents:
        if part in ("arguments", "config"):
            return True
        section = section_of(section, part)
    return section is not None and last in section.model_fields


@pytest.mark.parametrize(("key", "settings"), KEYS, ids=[key for key, _ in KEYS])
def test_the_page_says_what_the_error_says(key, settings):
    known = meant_by(key)
    if known is None:  # the same name, in one section or another
        assert set(settings) <= set(settings_named(key.split(".")[-1]))
    elif settings:
        assert set(settings_in(known)) <= set(settings)
        assert known.startswith(settings[0]), known
    else:
        assert known.startswith("nothing: ") or "environment" in known
    assert all(map(is_setting, settings)), settings


def test_the_page_has_every_key_of_other_tools():
    plain = {key for key, _ in KEYS} | {key.split(".")[-1] for key, _ in KEYS}
    assert {*SAME, *OTHERS} - plain == set()


def test_a_key_has_one_meaning():
    assert {*SAME} & {*OTHERS} == set()
    assert {name for name in {*SAME} & {*OWNED} if SAME[name] != OWNED[name]} == set()
    assert all(map(is_setting, SAME.values()))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"base_model": "gpt2"}, "base_model: unknown key, did you mean model.path? an experiment takes: name, "),
        (
            {"eval": {"interval": 9}},
            "eval.interval: unknown key; use train.eval_every_tokens, in tokens; section ",
        ),
        ({"optimizer": {"class_path": "a"}}, "optimizer: unknown key, did you mean train.optimizer? an experiment "),
        ({"load_in_4bit": True}, "load_in_4bit: unknown key; raylm has no such setting: weights are trained as they "),
        ({"corpus": {"token": "ids"}}, "corpus.token: unknown key, did you mean tokens? section corpus takes: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_tool_s_key_is_told_as_a_setting(tree, message):
    with pytest.raises(ConfigError) as caught:
        config.load(tree)
    assert caught.value.message.startswith(message)
