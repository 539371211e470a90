"""Storage that fails at any of its calls, in train, tune and prepare: the same command ends as if nothing had happened.

The file system is a local one of which one call goes wrong, or all from one on until the command has ended. A command
runs in this process, where a case takes half a second: without Ray, and Tune's part of a sweep is played.
"""

import contextlib
import dataclasses
import hashlib
import shutil
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs
import pytest
from conftest import Here, one_by_one
from played import Played, ray_trial
from ray.tune.experiment import Trial as RayTrial

from raylm import cluster, config, prepare, storage, sweep, tokens, train, training, tune
from raylm import plan as plans
from raylm.errors import RaylmError
from raylm.pipeline import sweep as sweeping
from raylm.sweep import trial as trials
from raylm.sweep import tuner
from raylm.tokens import write
from raylm.tracking import journal
from raylm.training import launch

ROOT = "failing://here"

WRONG = ("is out", "fails", "stalls", "truncates", "lies")
"""What goes wrong from the n-th call on; or at that one alone."""

MAY = {"truncates": ("write",), "lies": ("read", "info", "list", "open")}
"""The kinds of call that can go wrong so; all can fail."""


class Failing(pyarrow.fs.FileSystemHandler):
    """A local file system. Its calls are counted, those of the files that it opens too."""

    def __init__(self):
        self.inner = pyarrow.fs.LocalFileSystem()
        self.well()

    def well(self):
        """Nothing goes wrong any more."""
        self.calls: list[str] = []
        self.wrong, self.first = "", 0

    def goes_wrong(self, wrong, first):
        self.well()
        self.wrong, self.first = wrong, first

    def call(self, kind):
        """Whether this call is to go wrong in a way of its own; an OSError if it fails."""
        self.calls.append(kind)
        number = len(self.calls)
        if (self.wrong == "is out" and number >= self.first) or (self.wrong == "fails" and number == self.first):
            raise OSError(f"503 SlowDown at call {number}, {kind}")
        if number != self.first:
            return False
        if self.wrong == "stalls":
            time.sleep(0.02)
        return kind in MAY.get(self.wrong, ())

    def get_type_name(self):
        return "failing"

    def normalize_path(self, path):
        return path

    def __eq__(self, other):
        return self is other

    def __ne__(self, other):
        return self is not other

    def get_file_info(self, paths):
        if self.call("info"):
            return [pyarrow.fs.FileInfo(path, pyarrow.fs.FileType.NotFound) for path in paths]
        return self.inner.get_file_info(paths)

    def get_file_info_selector(self, selector):
        return [] if self.call("list") else self.inner.get_file_info(selector)

    def create_dir(self, path, recursive):
        self.call("create")
        self.inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path):
        self.call("delete")
        self.inner.delete_dir(path)

    def delete_dir_contents(self, path, missing_dir_ok=False):
        raise NotImplementedError

    delete_root_dir_contents = copy_file = open_append_stream = delete_dir_contents

    def delete_file(self, path):
        self.call("delete")
        self.inner.delete_file(path)

    def move(self, src, dest):
        self.call("move")
        self.inner.move(src, dest)

    def open_input_stream(self, path):
        return self.open_input_file(path)

    def open_input_file(self, path):
        if self.call("open"):
            raise FileNotFoundError(path)
        return pa.PythonFile(Opened(self, path, "rb"), mode="r")

    def open_output_stream(self, path, metadata):
        self.call("create")
        return pa.PythonFile(Opened(self, path, "wb"), mode="w")


class Opened:
    """A file of a Failing file system."""

    def __init__(self, system, path, mode):
        self.system, self.file = system, open(path, mode)  # noqa: SIM115 - closed by pyarrow
        self.is_cut = False

    def read(self, size=-1):
        if self.is_cut:
            return b""
        self.is_cut = self.system.call("read")
        content = self.file.read(size)
        return content[: len(content) // 2] if self.is_cut else content

    def write(self, content):
        is_cut = self.system.call("write")
        self.file.write(memoryview(content)[: len(content) // 2] if is_cut else content)
        return len(content)

    def __getattr__(self, name):
        return getattr(self.file, name)


# Commands in this process --------------------------------------------------------------------------------------------


class Paused(BaseException):
    """Tune ends a trial that waits."""


class OneByOne(Played):
    """It runs one trial after the other, and hands on what it reports."""

    def __init__(self, queue, job, resources, watcher):
        self.job, self.resources, self.watcher = job, resources, watcher
        super().__init__(queue)

    def stop_trial(self, trial):
        super().stop_trial(trial)
        self.watcher.on_trial_complete(0, self.trials, trial)

    def run(self):
        while True:
            self.take_new()
            pending = [trial for trial in self.trials if trial.status == RayTrial.PENDING]
            trial = self.scheduler.choose_trial_to_run(self) or next(iter(pending), None)
            if trial is None or self.search_alg.stopping():
                return
            self.run_trial(trial)

    def run_trial(self, trial):
        def report(result):
            decision = self.scheduler.on_trial_result(self, trial, result)
            self.search_alg.on_trial_result(trial.trial_id, result)
            self.watcher.on_trial_result(0, self.trials, trial, result)
            trial.update_last_result(result)
            if decision == self.scheduler.PAUSE:
                raise Paused
            assert decision == self.scheduler.CONTINUE

        trial.set_status(RayTrial.RUNNING)
        self.watcher.on_trial_start(0, self.trials, trial)
        context = SimpleNamespace(get_trial_id=lambda: trial.trial_id)
        told = SimpleNamespace(get_context=lambda: context, get_checkpoint=lambda: None, report=report)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trials, "tune", told)
            try:
                trials.run_trial(trial.config, template=self.job, resources=self.resources, repeat_of={})
            except Paused:
                trial.set_status(RayTrial.PAUSED)
                self.watcher.on_step_end(0, self.trials)
            else:
                self.stop_trial(trial)


def fit(job, resources=None, callbacks=()):
    session = job.session or Here
    return launch.with_smaller_batches(
        job, lambda: training.train_loop_per_worker(dataclasses.replace(job, session=session))
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A Failing file system at ROOT, and commands that run in this process. Nothing that a command leaves in memory
    is there for the next one."""
    system, farewells = Failing(), []
    resources = cluster.Resources({"CPU": 1.0}, {"CPU": 1.0}, 1, 1)
    channel = cluster.ProgressChannel()
    plain = storage.file_systems._file_system
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            storage.file_systems,
            "_file_system",
            lambda root: (pyarrow.fs.PyFileSystem(system), "/") if root == f"{ROOT}/" else plain(root),
        )
        patch.setattr(storage.retries, "RETRIES_SECONDS", (0.0, 0.0))
        patch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("tmp")))
        patch.setattr(journal, "REWRITE_SECONDS", 1e6)
        patch.setattr(journal, "atexit", SimpleNamespace(register=farewells.append))
        patch.setattr(plans, "start_worker_early", lambda: None)
        patch.setattr(cluster, "start_ray_early", lambda: None)
        patch.setattr(cluster, "connect", lambda *_, **__: contextlib.nullcontext(resources))
        patch.setattr(cluster, "other_nodes", dict)
        patch.setattr(cluster, "progress_channel", lambda *_: contextlib.nullcontext(channel))
        patch.setattr(launch, "fit", fit)
        patch.setattr(launch, "fit_in_this_process", fit)
        patch.setattr(write, "_each", one_by_one)
        patch.setattr(sweeping, "_report", lambda *_: None)  # it can be made again
        patch.setattr(sweep.TrialQueue, "_made", lambda _, name, settings: ray_trial(name, settings))
        patch.setattr(
            tuner,
            "run",
            lambda queue, job, resources, limits, watcher, *, together, on_added: OneByOne(
                queue, job, resources, watcher
            ).run(),
        )

        def end():
            """What is left when a command has ended."""
            for farewell in farewells:
                farewell()
                if farewell.__self__._timer is not None:
                    farewell.__self__._timer.cancel()
            farewells.clear()
            for cached in (
                journal.json_lines,
                journal.metric_writer,
                tokens.local_copy,
                tokens.store.local_tokenizer,
                tokens.store._split,
            ):
                cached.cache_clear()
            storage.retries._last_failure = -storage.retries.PAUSE_SECONDS
            channel.stopping = False

        yield SimpleNamespace(system=system, end=end)


SWEEP = {
    "tune.space": {"train.learning_rate": {"grid": [2e-2, 1e-2]}},
    "tune.num_samples": 1,
    "tune.scheduler": {"kind": "asha", "grace_tokens": 512, "reduction_factor": 2},
}


@dataclasses.dataclass
class Command:
    """A verb whose storage is ROOT + directory, which begins as a copy of `begins`."""

    verb: str
    file: Path
    begins: Path | None
    place: SimpleNamespace

    def run(self, directory):
        """What is left in the end that shall be the same: the best score, the model's bytes; the store's."""
        experiment = config.override(config.load(self.file), {"storage": f"{ROOT}{directory}"})
        config.save(experiment, self.file.with_name("experiment.yaml"))
        verb = {"train": train.train, "tune": tune.tune, "prepare": prepare.prepare}[self.verb]
        try:
            record = verb(config=self.file.with_name("experiment.yaml")).record
        finally:
            self.place.end()
        if self.verb == "prepare":
            found = contents(Path(record["store"].removeprefix(ROOT)))
            return {name: content for name, content in found.items() if not name.startswith("progress/")}
        best = record["best"] if self.verb == "tune" else record
        model = Path(best["checkpoint"].removeprefix(ROOT))
        weights = {
            name: content for name, content in contents(model).items() if name.endswith((".safetensors", "json"))
        }
        weights.pop("raylm.json")  # which has places
        scores = [(trial["status"], trial["tokens"], trial["perplexity"]) for trial in record.get("trials", [])]
        return best["perplexity"], scores, weights

    def ends_as(self, reference, directory, wrong="", first=0):
        """Whether it does, in spite of what goes wrong; and how it ended the first time."""
        if self.begins is not None:
            shutil.copytree(self.begins, directory)
        self.place.system.goes_wrong(wrong, first)
        told = "it went on"
        try:
            found = self.run(directory)
        except RaylmError as error:
            if error.exit_code != 5 and wrong not in ("lies", "truncates"):
                raise
            told = str(error)
            self.place.system.well()
            found = self.run(directory)
        assert found == reference, told
        shutil.rmtree(directory)
        return told


def contents(directory):
    """File -> SHA-256."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def commands(place, tiny, tmp_path_factory, one_thread):
    """By verb: a command, what is left when nothing goes wrong, and the kinds of its calls in their order."""
    home = tmp_path_factory.mktemp("home")
    found = {}
    for verb in ("prepare", "train", "tune"):
        (home / verb).mkdir()
        file = home / verb / "tiny.yaml"
        config.save(
            config.override(tiny("train.keep_checkpoints=1", "train.max_tokens=1536"), SWEEP if verb == "tune" else {}),
            file,
        )
        prepared = home / "prepared"
        command = Command(verb, file, prepared if prepared.exists() else None, place)
        directory = home / verb / "untouched"
        if command.begins is not None:
            shutil.copytree(prepared, directory)
        place.system.well()
        reference = command.run(directory)
        calls = place.system.calls
        if verb == "prepare":
            shutil.copytree(directory, prepared)
        found[verb] = command, reference, calls
    return found


def cases(calls, wrong, most):
    """At which of these calls it goes wrong: evenly spread, so many at most."""
    numbers = [number for number, kind in enumerate(calls, 1) if kind in MAY.get(wrong, (kind,))]
    most = min(most, len(numbers))
    return [numbers[(2 * part + 1) * len(numbers) // (2 * most)] for part in range(most)]


def ends_well(commands, verb, wrong, most, home):
    """Each case in a storage of its own; every one that ends otherwise is told of."""
    command, reference, calls = commands[verb]
    bad = []
    for number in cases(calls, wrong, most):
        try:
            command.ends_as(reference, home / f"{number}", wrong, number)
        except (Exception, Paused) as error:
            why = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
            bad.append(f"{wrong} at call {number} of {len(calls)}, {calls[number - 1]}: {why}")
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(("verb", "most"), [("prepare", 2), ("train", 1), ("tune", 1)])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_same_command_ends_as_if_nothing_had_happened(commands, tmp_path, verb, wrong, most):
    """20 cases."""
    ends_well(commands, verb, wrong, most, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("verb", "most"), [("prepare", 1000), ("train", 20), ("tune", 10)])
@pytest.mark.parametrize("wrong", WRONG)
def test_at_every_call(commands, tmp_path, verb, wrong, most):
    """About 430 cases: every call of prepare, and a spread over the 580 of train and the 1,000 of tune."""
    ends_well(commands, verb, wrong, most, tmp_path)


def test_each_call_is_counted_and_goes_wrong_as_it_is_told(tmp_path):
    system = Failing()
    files = pyarrow.fs.PyFileSystem(system)
    path = f"{tmp_path}/file"

    def write(content=b"content"):
        with files.open_output_stream(path) as stream:
            stream.write(content)

    def read():
        with files.open_input_file(path) as stream:
            return stream.read()

    write()
    assert (read(), system.calls) == (b"content", ["create", "write", "open", "read"])
    system.goes_wrong("fails", 1)
    with pytest.raises(OSError, match="503 SlowDown at call 1, open"):
        read()
    assert read() == b"content", "at that call alone"
    system.goes_wrong("is out", 2)
    for _ in range(2):
        with pytest.raises(OSError, match="503"):
            read()
    system.goes_wrong("lies", 2)
    assert read() == b"con"
    system.goes_wrong("lies", 1)
    assert files.get_file_info(path).type == pyarrow.fs.FileType.NotFound
    system.goes_wrong("truncates", 2)
    write()
    assert read() == b"con"
