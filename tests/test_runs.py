import errno
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from raylm import config, runs, storage
from raylm.checkpoint import CheckpointManager
from raylm.errors import ConfigError, StorageError, StorageUnavailable


@pytest.fixture
def experiment(tmp_path):
    return config.load(None, [f"storage={tmp_path}", "name=words"])


def begin(experiment, store="abc", resume="auto", verb="train"):
    return runs.start_or_resume(experiment, verb, store, resume)


def stop(begun, step=None):
    """As when the command dies: the lock is gone; and it had written a checkpoint, if a step is given."""
    if step is not None:
        CheckpointManager(f"{begun.directory}/checkpoints").commit(step, {})
    begun.lock.close()


def test_the_same_command_resumes_the_run_that_stopped(experiment):
    first = begin(experiment)
    stop(first, step=40)
    second = begin(experiment)
    assert (second.directory, second.step) == (first.directory, 40)


def test_a_run_that_somebody_works_on_is_left_alone(experiment):
    first = begin(experiment)
    assert begin(experiment).directory != first.directory


def test_a_finished_run_is_not_resumed(experiment, capsys):
    first = begin(experiment)
    first.end({"perplexity": 3.5})
    stop(first, step=40)
    assert json.loads(storage.read(f"{first.directory}/result.json")) == {"perplexity": 3.5}
    assert begin(experiment).directory != first.directory
    assert capsys.readouterr().err == (
        f"{first.directory} is a finished run of the same settings, and stays as it is. A new run starts.\n"
    )


def test_a_finished_run_with_a_smaller_budget_is_told_with_the_way_to_train_its_model_further(experiment, capsys):
    """It cannot resume by itself: its learning rate has followed the schedule to the end."""
    first = begin(experiment)
    first.end({"perplexity": 3.5})
    more = config.override(experiment, {"train.max_tokens": 2 * experiment.train.max_tokens})
    assert begin(more).directory != first.directory
    said = capsys.readouterr().err
    assert said.startswith(f"{first.directory} is a finished run of the same settings with a smaller budget.")
    assert said.endswith(
        f"schedule (linear) to the end. A new run starts; to train that run's model further instead, "
        f"give model.path={first.directory}/model\n"
    )
    begin(config.override(experiment, {"train.num_epochs": 30}))
    assert first.directory in capsys.readouterr().err, "budgets that cannot be compared"
    begin(more, resume="never")
    begin(config.override(more, {"train.seed": 7}))
    begin(config.override(experiment, {"train.max_tokens": experiment.train.max_tokens // 2}))
    begin(more, store="another")
    assert capsys.readouterr().err == ""
    adapter = {"name": "adapter", "model.path": "base", "model.config": None, "model.lora": {"export": "adapter"}}
    experiment = config.override(experiment, adapter)
    begin(experiment).end({"perplexity": 3.5})
    begin(config.override(experiment, {"train.max_tokens": 2 * experiment.train.max_tokens}))
    assert capsys.readouterr().err.endswith("to the end. A new run starts\n"), "an adapter cannot be trained further"
    other = config.override(experiment, {"name": "other"})
    failed = begin(other)
    failed.end({"error": "diverged"})
    begin(config.override(other, {"train.max_tokens": 2 * experiment.train.max_tokens}))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("settings", "store", "told"),
    [
        ("blocks.block_size=256", "abc", "blocks.block_size: 64 then, 256 now"),
        ("model.config.n_layer=3", "abc", "model.config.n_layer: 2 then, 3 now"),
        ("train.batch_tokens=1024", "abc", "train.batch_tokens: 512 then, 1024 now"),
        ("train.learning_rate=1e-3", "abc", "train.learning_rate: 0.005 then, 0.001 now"),
        ("train.data_seed=0", "abc", "train.data_seed: null then, 0 now"),
        ("train.seed=0", "abd", 'tokens: "abc" then, "abd" now'),
    ],
)
def test_other_settings_or_other_tokens_are_refused_with_both_values(experiment, settings, store, told):
    stop(begin(experiment), step=40)
    changed = config.load(None, [f"storage={experiment.storage}", "name=words", settings])
    with pytest.raises(ConfigError, match=rf"stopped after step 40 .*\n  {told}\n.*--resume never"):
        begin(changed, store)
    assert begin(changed, store, "never").step is None


def test_what_changes_nothing_about_a_run_may_change(experiment):
    first = begin(experiment)
    stop(first, step=40)
    free = ["cluster.num_workers=2", "tracking.uri=null", "train.micro_batch_tokens=64", "eval.batch_tokens=128"]
    again = config.load(None, [f"storage={experiment.storage}", "name=words", *free])
    assert begin(again).directory == first.directory


def test_what_was_auto_stays_what_it_was_when_the_run_started(experiment, capsys):
    key, first = "cluster.cpus_per_worker", begin(experiment)
    assert first.decided == {}
    assert first.settled(experiment, {key: 2}).cluster.cpus_per_worker == 2
    stop(first, step=40)
    second = begin(experiment)
    assert second.decided == {key: 2}
    assert second.settled(experiment, {key: 2}).cluster.cpus_per_worker == 2
    assert capsys.readouterr().err == ""
    assert second.settled(experiment, {key: 1}).cluster.cpus_per_worker == 1
    assert f"{key}=2, as when the run started, does not fit here: 1 instead" in capsys.readouterr().err
    given = config.override(experiment, {key: 4})
    assert second.settled(given, {key: 4}) == given
    assert second.decided == {key: 2}, "for when it fits again"


def test_a_run_without_a_checkpoint_is_resumed_or_given_up(experiment):
    first = begin(experiment)
    stop(first)
    second = begin(experiment)
    assert (second.directory, second.step) == (first.directory, None)
    stop(second)
    other = begin(config.override(experiment, {"train.seed": 1}))
    assert (other.step, other.abandoned) == (None, [first.directory])


def test_must_needs_a_run_to_resume(experiment):
    with pytest.raises(StorageError, match="--resume must: no run in .*words stopped before its end"):
        begin(experiment, resume="must")


def test_the_lock_goes_with_the_process(experiment):
    first = begin(experiment)
    if os.fork() == 0:  # a child that inherits the lock and dies
        os._exit(0)
    os.wait()
    assert begin(experiment).directory != first.directory, "still held here"


def test_a_run_that_was_given_up_stays_so(experiment):
    """--resume never begins another; the next plain command goes on with that one, or begins one more."""
    first = begin(experiment)
    stop(first, step=40)
    second = begin(experiment, resume="never")
    assert (second.step, second.abandoned) == (None, [first.directory])
    stop(second, step=20)
    third = begin(experiment)
    assert (third.directory, third.step) == (second.directory, 20)
    third.end({"perplexity": 3.5})
    stop(third)
    assert begin(experiment).directory not in (first.directory, second.directory)
    assert "given up" in json.loads(storage.read(f"{first.directory}/result.json"))["error"]
    other = config.override(experiment, {"train.learning_rate": 1e-3})
    assert begin(other).step is None, "it is in nobody's way"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_run_is_resumed_also_without_locks(experiment, monkeypatch, code):
    """Lustre without -o flock, some of FUSE, NFS without a lock server."""

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    first = begin(experiment)
    stop(first, step=40)
    second = begin(experiment, resume="must")
    assert (second.directory, second.step) == (first.directory, 40)


def test_a_lock_that_fails_is_an_error_that_names_it(experiment, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageUnavailable, match=r"/lock cannot be locked: Input/output error"):
        begin(experiment)


def test_two_commands_that_begin_at_once_work_in_directories_of_their_own(experiment, monkeypatch):
    """The second one looks while the first has made its directory and has not locked it yet."""
    has_made, may_lock = threading.Event(), threading.Event()
    plain = fcntl.flock

    def flock(*args):
        if threading.current_thread().name == "first":
            has_made.set()
            may_lock.wait(10)
        return plain(*args)

    monkeypatch.setattr(fcntl, "flock", flock)
    found = {}
    first = threading.Thread(target=lambda: found.update(first=begin(experiment)), name="first")
    first.start()
    assert has_made.wait(10)
    found["second"] = begin(experiment)
    may_lock.set()
    first.join()
    assert found["first"].directory != found["second"].directory
    assert None not in (found["first"].lock, found["second"].lock)


def test_the_rungs_of_a_sweep_stay_where_they_are(experiment):
    """ASHA's lie in whole saves: where a trial waits it has a checkpoint."""
    asha = config.override(experiment, {"tune.space": {"train.seed": {"choice": [1]}}})
    changed = config.override(asha, {"train.save_every_tokens": 4096})
    first = runs.start_or_resume(asha, "tune", "abc", "auto")
    os.mkdir(f"{first.directory}/trial_00000")
    stop(first)
    with pytest.raises(ConfigError, match="train.save_every_tokens: null then, 4096 now"):
        runs.start_or_resume(changed, "tune", "abc", "auto")
    no_rungs = {"tune.scheduler": "none", "name": "others"}
    first = runs.start_or_resume(config.override(asha, no_rungs), "tune", "abc", "auto")
    stop(first)
    again = runs.start_or_resume(config.override(changed, no_rungs), "tune", "abc", "auto")
    assert again.directory == first.directory


@pytest.fixture
def finished_sweep(experiment):
    """(an experiment with a space, the finished sweep of it)"""
    swept = config.override(experiment, {"tune.space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}})
    first = runs.start_or_resume(swept, "tune", "abc", "auto", lambda _: False)
    first.end({"best": {}})
    stop(first)
    return swept, first


def test_a_finished_sweep_is_extended_if_there_are_more_trials_and_else_nothing_starts(finished_sweep):
    swept, first = finished_sweep
    same = runs.start_or_resume(swept, "tune", "abc", "auto", lambda _: False)
    assert (same.directory, same.state) == (first.directory, "finished")
    stop(same)
    again = runs.start_or_resume(swept, "tune", "abc", "must", lambda directory: directory == first.directory)
    assert (again.directory, again.state) == (first.directory, "extended")
    assert runs.result_of(first.directory) == {"best": {}}, "it has not been prepared for more trials yet"
    again.reopen(swept)
    stop(again)
    resumed = runs.start_or_resume(swept, "tune", "abc", "must", lambda _: False)
    assert (resumed.directory, resumed.state) == (first.directory, "open")
    resumed.end({"best": {}})
    stop(resumed)
    other = runs.start_or_resume(swept, "tune", "abc", "never", lambda _: True)
    assert other.directory != first.directory


WIDER = {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}}


@pytest.mark.parametrize(
    ("settings", "store", "is_extended"),
    [
        ({"tune.space": WIDER}, "abc", True),
        ({"tune.space": {**WIDER, "train.seed": {"randint": [0, 9]}}}, "abc", True),
        ({"tune.space": {"train.seed": {"randint": [0, 9]}}}, "abc", False),
        ({"train.max_tokens": 4096}, "abc", False),
        ({"model.config.n_layer": 3, "tune.space": WIDER}, "abc", False),
        ({}, "other", False),
    ],
    ids=["wider", "a key more", "another key", "budget", "model", "corpus"],
)
def test_which_sweep_is_extended(finished_sweep, settings, store, is_extended):
    swept, first = finished_sweep
    changed = config.override(swept, settings)
    found = runs.start_or_resume(changed, "tune", store, "auto", lambda _: True)
    assert (found.directory == first.directory) is is_extended
    if is_extended:
        found.reopen(changed)
        assert runs.started_with(found.directory).tune.space == changed.tune.space


def test_a_changed_space_without_more_trials_is_another_sweep(finished_sweep):
    swept, first = finished_sweep
    changed = config.override(swept, {"tune.space": WIDER})
    assert runs.start_or_resume(changed, "tune", "abc", "auto", lambda _: False).directory != first.directory


def test_of_the_finished_sweeps_the_one_of_the_same_space_is_extended(finished_sweep):
    swept, first = finished_sweep
    changed = config.override(swept, {"tune.space": WIDER})
    newer = runs.start_or_resume(changed, "tune", "abc", "never", lambda _: True)
    newer.end({"best": {}})
    stop(newer)
    assert runs.start_or_resume(swept, "tune", "abc", "auto", lambda _: True).directory == first.directory


def test_a_stopped_sweep_resumes_with_a_wider_space(experiment, capsys):
    swept = config.override(experiment, {"tune.space": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}}})
    first = runs.start_or_resume(swept, "tune", "abc", "auto")
    os.mkdir(f"{first.directory}/trial_00000")
    stop(first)
    again = runs.start_or_resume(config.override(swept, {"tune.space": WIDER}), "tune", "abc", "auto")
    assert (again.directory, again.state) == (first.directory, "extended")
    assert "[0.0001, 0.01] then, [1e-05, 0.01] now; its trials so far keep their settings" in capsys.readouterr().err
    stop(again)
    other = config.override(swept, {"tune.space": {"train.seed": {"randint": [0, 9]}}})
    with pytest.raises(ConfigError, match="was started with other settings"):
        runs.start_or_resume(other, "tune", "abc", "auto")


def test_an_extended_sweep_on_remote_storage_is_no_longer_noted_as_ended(tmp_path):
    settings = [f"storage=file://{tmp_path}", "name=words", "tune.space={train.seed: {randint: [0, 9]}}"]
    experiment = config.load(None, settings)
    first = runs.start_or_resume(experiment, "tune", "abc", "auto")
    first.end({"best": {}})
    runs.start_or_resume(experiment, "tune", "abc", "auto", lambda _: True).reopen(experiment)
    assert runs.start_or_resume(experiment, "tune", "abc", "must").state == "open"
    assert not storage.names(f"{runs.directory_of(experiment)}/{runs.ENDED}")


def test_a_setting_that_an_older_raylm_did_not_have_had_its_default(experiment):
    first = begin(experiment)
    terms = json.loads(Path(first.directory, "run.json").read_text())
    del terms["train.patience"], terms["blocks.packing"]
    Path(first.directory, "run.json").write_text(json.dumps(terms))
    stop(first, step=40)
    with pytest.raises(ConfigError, match='blocks.packing: "packed" then, "padded" now'):
        begin(config.override(experiment, {"blocks.packing": "padded"}))
    assert begin(experiment).step == 40


def test_the_searcher_of_a_sweep_that_an_older_raylm_started_is_known_by_its_old_key(experiment):
    first = begin(experiment, verb="tune")
    terms = json.loads(Path(first.directory, "run.json").read_text())
    terms["tune.searcher"] = terms.pop("tune.searcher.kind")
    del terms["tune.searcher.sampler"]
    Path(first.directory, "run.json").write_text(json.dumps(terms))
    Path(first.directory, "trial_00000").mkdir()
    first.lock.close()
    with pytest.raises(ConfigError, match='tune.searcher.kind: "random" then, "optuna" now'):
        begin(config.override(experiment, {"tune.searcher": "optuna"}), verb="tune")
    assert begin(experiment, verb="tune").directory == first.directory


def test_runs_that_are_over_cost_a_command_no_requests_of_their_own(tmp_path, monkeypatch):
    """On remote storage: after 21 of them, one of which an older raylm has ended."""
    experiment = config.load(None, [f"storage=file://{tmp_path}", "name=words"])
    for _ in range(20):
        begun = begin(experiment, resume="never")
        begun.end({"perplexity": 3.5})
    storage.remove_file(f"{runs.directory_of(experiment)}/{runs.ENDED}/{begun.name}")
    begin(experiment).end({"perplexity": 3.5})
    requests = []
    for name in ("read", "names"):
        plain = getattr(storage, name)
        monkeypatch.setattr(storage, name, lambda path, plain=plain: (requests.append(path), plain(path))[1])
    stopped = begin(experiment)
    assert len(requests) == 4, "the directory, the index, and two files of the newest"
    CheckpointManager(f"{stopped.directory}/checkpoints").commit(40, {})
    assert begin(experiment).directory == stopped.directory
