import contextlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from raylm import checkpoint, config, storage, tokenizer
from raylm.config import TrainedTokenizer
from raylm.errors import StorageError, StorageUnavailable


@pytest.fixture
def saved(tmp_path):
    sizes = {"vocab_size": 260, "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 16}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    directory = tmp_path / "model"
    network.save_pretrained(directory)
    tokenizer.train(["a b c"], TrainedTokenizer(vocab_size=260)).save_pretrained(directory)
    return directory, network


def test_a_plain_model_directory_loads(saved):
    directory, network = saved
    trained = checkpoint.load(directory)
    assert torch.equal(trained.model.transformer.wte.weight, network.transformer.wte.weight)
    assert (trained.experiment, trained.record, trained.context) == (None, {}, 16)


def test_what_raylm_wrote_beside_a_model_comes_back(saved):
    directory, _ = saved
    experiment = config.load(None, ["train.seed=7"])
    checkpoint.describe(directory, experiment, {"store": "s", "best": {"perplexity": 3.5}})
    trained = checkpoint.load(directory)
    assert trained.experiment == experiment
    assert trained.record["best"]["perplexity"] == 3.5


def test_what_is_not_a_model_is_named(saved, tmp_path):
    with pytest.raises(StorageError, match="missing is not a directory"):
        checkpoint.locate(tmp_path / "missing")
    with pytest.raises(StorageError, match=r"has no config.json; did you mean .*model\?"):
        checkpoint.locate(tmp_path)


def test_a_torn_model_is_named(saved):
    directory, _ = saved
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match=r"model cannot be loaded: Safetensor"):
        checkpoint.load(directory)


# The checkpoints of a run --------------------------------------------------------------------------------------------

FILES = {"model.safetensors": b"weights" * 100, "optimizer.pt": b"\0" * 64, "rng_state_1.pth": b"r", "empty": b""}


def committed(series, local, step):
    """A checkpoint of FILES."""
    local.mkdir(exist_ok=True)
    for name, content in FILES.items():
        (local / name).write_bytes(content)
    series.commit(step, series.upload(step, local))


@pytest.fixture
def series(tmp_path):
    return checkpoint.CheckpointManager(str(tmp_path / "checkpoints"))


def test_the_newest_undamaged_checkpoint_is_used_and_skipped_ones_are_named_with_their_damage(series, tmp_path):
    for step in (20, 40, 60, 80):
        committed(series, tmp_path / "local", step)
    weights = Path(series.path(60)) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:300])
    (Path(series.path(80)) / "manifest.json").unlink()
    step, faults = series.newest()
    assert step == 40
    assert faults == [
        f"{series.path(80)}: manifest.json: missing, so it was never completed",
        f"{series.path(60)}: model.safetensors: 300 of 700 bytes",
    ]


def test_if_every_completed_checkpoint_is_damaged_each_is_named(series, tmp_path):
    for step in (20, 40):
        committed(series, tmp_path / "local", step)
        (Path(series.path(step)) / "optimizer.pt").unlink()
    with pytest.raises(StorageError, match=r"(?s)every checkpoint .* damaged.*00040: optimizer.pt: missing.*00020: .*"):
        series.newest()


def test_a_run_without_checkpoints_has_none(series, tmp_path):
    assert series.newest() == (None, [])
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "model.safetensors").write_bytes(b"half of")
    series.upload(20, tmp_path / "local")
    assert series.newest()[0] is None, "one that was never completed is none"


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_read_that_fails_is_made_again_and_is_no_damage(series, tmp_path, monkeypatch, failures):
    """503 SlowDown, for so many reads of one file: two further tries are made."""
    for step in (20, 40):
        committed(series, tmp_path / "local", step)
    plain, failed = storage.files.reading, []

    @contextlib.contextmanager
    def reading(path):
        if path == f"{series.path(40)}/optimizer.pt" and len(failed) < failures:
            failed.append(path)
            raise OSError("503 SlowDown")
        with plain(path) as stream:
            yield stream

    monkeypatch.setattr(storage.files, "reading", reading)
    monkeypatch.setattr(storage.retries, "RETRIES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(storage.retries, "_last_failure", -storage.retries.PAUSE_SECONDS)
    if failures < 3:
        assert series.newest() == (40, [])
    else:
        told = r"step_00000040/optimizer.pt cannot be reached: 503 SlowDown; once it can, the same command resumes$"
        with pytest.raises(StorageUnavailable, match=told):
            series.newest()
    assert series.complete() == [20, 40]


def test_nothing_is_waited_for_again_and_again(series, tmp_path, monkeypatch):
    """A command with many files ends soon once its storage has failed for as long as all tries take."""
    committed(series, tmp_path / "local", 20)
    tries = []

    @contextlib.contextmanager
    def reading(path):
        tries.append(path)
        raise OSError("503 SlowDown")
        yield

    monkeypatch.setattr(storage.files, "reading", reading)
    monkeypatch.setattr(storage.retries, "RETRIES_SECONDS", (0.01, 0.01))
    monkeypatch.setattr(storage.retries, "_last_failure", -storage.retries.PAUSE_SECONDS)
    for count in (3, 4, 5):
        with pytest.raises(StorageUnavailable):
            series.damage(20)
        assert len(tries) == count


def test_a_copy_beside_a_checkpoint_is_none(series, tmp_path):
    committed(series, tmp_path / "local", 40)
    for name in ("step_00000040.bak", "step_00000041 (copy)", "step_old"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert series.steps() == [40]
    series.prune(1, [])
    assert len(storage.names(series.directory)) == 4, "it is left alone"


def test_the_last_and_the_best_are_kept(series, tmp_path):
    for step in (20, 40, 60, 80, 100):
        committed(series, tmp_path / "local", step)
    (tmp_path / "checkpoints" / "step_00000050").mkdir()  # begun and never completed
    (tmp_path / "checkpoints" / "step_00000120").mkdir()  # being written
    series.prune(2, [40])
    assert series.steps() == [40, 80, 100, 120]


def test_a_manifest_that_names_a_file_outside_is_damaged(series, tmp_path):
    committed(series, tmp_path / "local", 20)
    manifest = Path(series.path(20)) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"empty"', '"../../empty"'))
    assert series.damage(20) == "manifest.json: damaged"


MUTATIONS = st.tuples(
    st.sampled_from([*FILES, "manifest.json"]),
    st.sampled_from(["truncate", "flip", "zero", "delete", "grow"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
)


@settings(max_examples=300, deadline=None)
@given(MUTATIONS)
def test_every_damage_to_a_checkpoint_is_found(tmp_path_factory, mutation):
    name, how, where, bit = mutation
    home = tmp_path_factory.mktemp("damage")
    series = checkpoint.CheckpointManager(str(home / "checkpoints"))
    committed(series, home / "local", 20)
    file = Path(series.path(20)) / name
    whole = file.read_bytes()
    place = int(where * len(whole))
    if how == "delete":
        file.unlink()
    elif how == "grow":
        file.write_bytes(whole + b"\0")
    elif how == "truncate":
        file.write_bytes(whole[:place])
    elif how == "zero":
        file.write_bytes(whole[:place] + bytes(len(whole) - place))
    elif whole:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
    changed = not file.exists() or file.read_bytes() != whole
    assert (series.damage(20) is not None) == changed


@pytest.mark.parametrize("answer", [None, b'{"files": {"model.safe'])
def test_a_manifest_that_cannot_be_read_once_is_no_damage(series, tmp_path, monkeypatch, answer):
    """Else a run would resume from the checkpoint before."""
    committed(series, tmp_path / "local", 5)
    answers, read = [answer], storage.read
    monkeypatch.setattr(storage, "read", lambda path: answers.pop() if answers else read(path))
    assert series.newest() == (5, [])
    assert not answers
