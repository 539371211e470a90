import functools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from raylm import __version__, config

RAYLM = Path(config.__file__).parents[1]
VERBS = [
    verb
    for verb in ("prepare", "train", "tune", "evaluate", "generate", "inspect", "push", "sync")
    if (RAYLM / f"{verb}.py").exists()
]
HEAVY = {"torch", "ray", "mlflow", "transformers", "datasets", "accelerate", "pyarrow", "pandas", "matplotlib"}

VERB = '''
"""A verb that does what the experiment's name says, among libraries that print."""

import os, subprocess, sys
import typer
from raylm import cli, console
from raylm.errors import DataError

def verb(settings: cli.Settings = None, config: cli.ConfigFile = None, print_config: cli.PrintConfig = False,
         json: cli.Json = False) -> cli.CommandResult:
    """Do it."""
    experiment = cli.experiment(config, settings, print_config)
    print("noise of Python")
    os.write(1, b"noise of a C library\\n")
    subprocess.run(["echo", "noise of a subprocess"], check=True)
    match experiment.name:
        case "fails":
            raise DataError("nothing in /data/[ab] at x.yaml:100:3\\ntwo lines", where="corpus.paths")
        case "breaks":
            raise ZeroDivisionError("division by zero")
        case "interrupted":
            raise KeyboardInterrupt
        case "stopped":
            raise KeyboardInterrupt("stopped after step 3, which is saved")
        case "nan":
            return cli.CommandResult({"perplexity": float("nan")}, "nan")
    with console.task("Working", "things") as advance:
        advance(1, 2)
    return cli.CommandResult({"texts": ["é [bold] :100:"]}, "é [bold] :100:\t" + "long " * 60)

if __name__ == "__main__":
    cli.run(verb)
'''


@pytest.fixture
def verb(tmp_path):
    """Run the verb above in a process of its own."""
    (tmp_path / "verb.py").write_text(VERB)
    return lambda *argv: run(tmp_path / "verb.py", *argv)


def run(*command):
    forced = {"COLUMNS", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS"}  # each makes rich write otherwise
    environment = {key: value for key, value in os.environ.items() if key not in forced}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment | {"PYTHONIOENCODING": "utf-8"},
        timeout=60,
    )


# One result on stdout ----------------------------------------------------------------------------------------------


def test_json_is_all_of_stdout(verb):
    done = verb("--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"texts": ["é [bold] :100:"]})
    assert done.stdout.count("\n") == 1
    for noise in ("noise of Python", "noise of a C library", "noise of a subprocess", "Working …"):
        assert noise in done.stderr


def test_without_json_the_view_is_on_stdout_as_it_is(verb):
    """Neither folded nor taken for markup: it may be a command to copy."""
    done = verb()
    assert done.stdout.endswith("é [bold] :100:\t" + "long " * 60 + "\n")
    assert "Working …" in done.stderr


def test_options_of_other_tools_are_told_as_settings(verb):
    """The first try of those who know transformers' run_clm.py."""
    done = verb("--model_name_or_path", "gpt2", "--learning-rate=1e-3", "--max_steps", "9", "--json", "--foo", "1")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == (
        "No such option: --model_name_or_path; settings are given as section.key=value: model.path=gpt2 "
        "train.learning_rate=1e-3, train.max_tokens for --max_steps"
    )
    assert ": train.arguments.adam_beta1=0.8" in verb("--adam_beta1", "0.8").stderr
    assert "train.arguments.name=value" in verb("--ddp_timeout", "9").stderr
    told = verb("--train.max_seq_length=64", "--packing", "true", "--load_in_4bit", "true").stderr
    assert "blocks.block_size=64, blocks.packing, packed or padded for --packing, nothing for --load_in_4bit (" in told
    assert verb("--config").stderr == "error: Option '--config' requires an argument.\n"


WRITES = {
    "tempfile.gettempdir()": "no writable temporary directory found in ['/",
    "tempfile.TemporaryFile(dir='.', buffering=0).write(bytes(9999))": "a temporary file: File too large; make room",
    "open('kept', 'xb', buffering=0).write(bytes(9999))": "a temporary file: File too large; make room",
}


@pytest.mark.parametrize("write", WRITES)
def test_a_full_disk_is_told_in_one_line_whoever_writes_to_it(write, tmp_path):
    """Many libraries look for a temporary directory as they are imported. A limit stands for a full disk."""
    (tmp_path / "writes.py").write_text(
        f"import tempfile\nfrom raylm import cli\n\ndef verb() -> cli.CommandResult:\n    {write}\n\ncli.run(verb)\n"
    )
    command = 'ulimit -f 0; cd "$1"; exec "$0" writes.py'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {WRITES[write]}")
    assert line.endswith("set TMPDIR to another directory; then run the same command again")


def test_libraries_do_not_warn_on_the_screen(tmp_path):
    """Unless Python is told to let them."""
    (tmp_path / "warns.py").write_text(
        "from raylm import cli\n\ndef verb() -> cli.CommandResult:\n    import warnings\n"
        "    warnings.warn('of old', FutureWarning)\n    return cli.CommandResult({}, 'done')\n\ncli.run(verb)\n"
    )
    assert run(tmp_path / "warns.py").stderr == ""
    assert "FutureWarning: of old" in run("-Wdefault", tmp_path / "warns.py").stderr


FAILURES = {
    "fails": {"error": "nothing in /data/[ab] at x.yaml:100:3\ntwo lines", "where": "corpus.paths", "exit_code": 3},
    "breaks": {"error": "ZeroDivisionError: division by zero", "where": None, "exit_code": 1},
    "interrupted": {"error": "interrupted", "where": None, "exit_code": 130},
    "stopped": {"error": "stopped after step 3, which is saved", "where": None, "exit_code": 130},
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_json_object_too(verb, name):
    done = verb(f"name={name}", "--json")
    assert json.loads(done.stdout) == FAILURES[name]
    assert done.returncode == FAILURES[name]["exit_code"]


def test_a_result_that_is_no_json_is_a_failure(verb):
    done = verb("name=nan", "--json")
    assert json.loads(done.stdout)["error"].startswith("ValueError: Out of range float")
    assert done.returncode == 1


def test_a_failure_for_people(verb):
    done = verb("name=fails")
    assert done.returncode == 3
    assert "error: nothing in /data/[ab] at x.yaml:100:3\nerror: two lines\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "error" not in done.stdout


def test_a_bug_shows_its_traceback(verb):
    assert "Traceback" in verb("name=breaks").stderr


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (
            ["--nope"],
            "No such option: --nope; settings are given as section.key=value, other fields of TrainingArguments as "
            "train.arguments.name=value",
        ),
        (["--config"], "Option '--config' requires an argument."),
        (["train.seed"], "'train.seed' is not a setting; write section.key=value"),
        (["train.seed=x"], "command line: train.seed: must be a whole number, got 'x'"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line(verb, argv, error):
    done = verb("--json", *argv)
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"] == error
    assert json.loads(done.stdout)["exit_code"] == 2
    assert f"error: {error}" in done.stderr


def test_print_config_loads_again(verb, tmp_path):
    done = verb("--print-config", "train.seed=7", "corpus.paths=['a/[ab].txt', ':100:']", f"storage={tmp_path}")
    assert done.returncode == 0
    (tmp_path / "printed.yaml").write_text(done.stdout)
    printed = config.load(tmp_path / "printed.yaml")
    assert (printed.train.seed, printed.storage) == (7, str(tmp_path))
    assert printed.corpus.paths == (os.path.abspath("a/[ab].txt"), os.path.abspath(":100:"))
    assert verb("--print-config", "--config", tmp_path / "printed.yaml").stdout == done.stdout


def test_print_config_as_json(verb):
    assert json.loads(verb("--print-config", "--json").stdout) == config.load().model_dump(mode="json")


@pytest.mark.parametrize("line", [("raylm", "evaluate"), ("raylm.tune", "train.sed=1", "--json")], ids=" ".join)
def test_print_schema_prints_what_the_first_line_of_print_config_names(line):
    """Whatever else the command line has or lacks, so that a file with faults can be mended with it."""
    done = run("-X", "importtime", "-m", *line, "--print-schema")
    assert done.returncode == 0
    assert json.loads(done.stdout) == config.json_schema()
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert imported & HEAVY == set()
    assert "print-schema > raylm.schema.json" in config.dump(config.load(), comments=True)
    assert config.dump(config.load(), comments=True).startswith("# yaml-language-server: $schema=raylm.schema.json\n")


# The verbs themselves ----------------------------------------------------------------------------------------------

COMMANDS = [("-m", "raylm"), *[("-m", "raylm", verb) for verb in VERBS], *[("-m", f"raylm.{verb}") for verb in VERBS]]


@functools.cache
def help_of(*line):
    """--help of a command, with what it imports on stderr; each is run once."""
    return run("-X", "importtime", *line, "--help")


@pytest.mark.parametrize("line", COMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(line):
    """That is what keeps it at 0.2 s."""
    done = help_of(*line)
    assert done.returncode == 0
    assert "Usage:" in done.stdout
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    imported = {module.split(".")[0] for module in modules}
    assert "typer" in imported
    assert imported & HEAVY == set()
    assert "raylm.config" not in modules, "which makes the classes of all settings, in 0.2 s"


@pytest.mark.parametrize("line", [(), ("help",), ("help", "train"), ("-h",), ("train", "-h")], ids=" ".join)
def test_help_in_every_way_that_people_ask_for_it(line):
    done = run("-m", "raylm", *line)
    assert done.returncode == 0
    named = [word for word in line if word == "train"]
    assert f"Usage: {' '.join(['raylm', *named])} [OPTIONS]" in done.stdout
    assert "error" not in done.stderr


def test_a_misspelt_command_is_told_the_near_one():
    for line in (("trian",), ("help", "trian")):
        done = run("-m", "raylm", *line)
        assert (done.returncode, done.stderr.strip()) == (2, "error: No such command 'trian'. Did you mean 'train'?")


def test_the_version():
    done = run("-m", "raylm", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"raylm {__version__}")


def test_a_shell_completes_commands_and_options(monkeypatch):
    # Otherwise typer takes the shell that it runs in, and pytest may run in none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = run("-m", "raylm", "--show-completion", "bash").stdout
    assert "complete -o default -F _raylm_completion raylm" in script
    for words, completed in (("raylm tr", "train"), ("raylm train --re", "--resume")):
        for name, value in {"_RAYLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "-1"}.items():
            monkeypatch.setenv(name, value.replace("-1", str(len(words.split()) - 1)))
        assert run("-m", "raylm").stdout.split() == [completed]


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_what_every_option_does(verb):
    text = help_of("-m", f"raylm.{verb}").stdout
    of_an_experiment = ("--config", "--print-config", "--dry-run") if "SECTION.KEY=VALUE" in text else ()
    for option in ("--json", *of_an_experiment):
        assert re.search(rf"{option} .*\w\w\w", text), option


@pytest.mark.parametrize("command", [("raylm.train",), ("raylm", "train"), ("raylm.tune",), ("raylm", "tune")])
def test_a_verb_refuses_a_wrong_setting_before_anything_starts(command, tmp_path):
    done = run("-X", "importtime", "-m", *command, "train.sed=1", f"storage={tmp_path}/runs", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["where"] == "train.sed"
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert imported & HEAVY == set()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("verb", [verb for verb in ("prepare", "train", "tune") if verb in VERBS])
def test_a_verb_prints_its_config(verb):
    printed = run("-m", f"raylm.{verb}", "--print-config", "--json", "train.seed=7")
    assert json.loads(printed.stdout) == config.load(settings=["train.seed=7"]).model_dump(mode="json")


STOPPED = """
import os, signal, time
class Dying:
    def __del__(self):
        signal.raise_signal({number})
if {in_fork}:
    os.register_at_fork(after_in_parent=lambda: signal.raise_signal({number}))
from raylm import cli
from raylm.errors import Interrupted
cli._heed_signals()
try:
    if {in_fork} and os.fork() == 0:
        os._exit(0)
    if not {in_fork}:
        Dying()
    time.sleep(20)
    print("lost")
except (Interrupted, KeyboardInterrupt) as told:
    print(type(told).__name__)
"""


@pytest.mark.parametrize("in_fork", [True, False], ids=["fork", "__del__"])
@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "Interrupted"), (signal.SIGINT, "KeyboardInterrupt")])
def test_a_signal_where_python_loses_an_exception_takes_effect_after_it(number, name, in_fork):
    """In what is called around a fork, which would keep the lock of logging, and in a __del__."""
    script = STOPPED.format(number=int(number), in_fork=in_fork)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (told.stdout, told.stderr) == (f"{name}\n", "")


def test_a_signal_that_is_ignored_stays_so():
    """As Ctrl-C is where a script of a shell has started the command in the background."""
    script = "import signal; from raylm import cli; cli._heed_signals(); print(signal.getsignal(signal.SIGINT).name)"
    ignoring = ["sh", "-c", 'trap \'\' INT; exec "$0" -c "$1"', sys.executable, script]
    assert subprocess.run(ignoring, capture_output=True, text=True, timeout=60).stdout == "SIG_IGN\n"
