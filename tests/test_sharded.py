"""Training beyond one device: weights shared out among workers, half precision, compiled models."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import OfGroup
from ray import cloudpickle
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from raylm import api, checkpoint, cluster, config, export, perplexity, shards, storage, tokens, tracking, training
from raylm.config import override
from raylm.errors import ConfigError, StorageError
from raylm.pipeline import training as pipeline_training
from raylm.training import costs, launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


TWO_WORKERS = (
    "cluster.num_workers=2",
    "cluster.cpus_per_worker=0.5",
    "train.max_tokens=1024",
    "train.eval_every_tokens=512",
    "train.micro_batch_tokens=64",
    "eval.max_tokens=800",
    "eval.batch_tokens=64",
)


def noting(what, marks: Path, base=training.RayTrainSession):
    """A session whose workers each leave `what(trainer)` of their last forward pass in a file."""

    class Noting(base):
        def __init__(self):
            super().__init__()
            from raylm.training import trainer

            plain = trainer._Trainer.compute_loss

            def compute_loss(self, *args, **kwargs):
                (marks / f"{self.session.rank}").write_text(json.dumps(what(self)))
                return plain(self, *args, **kwargs)

            trainer._Trainer.compute_loss = compute_loss

    return Noting


@pytest.fixture(scope="module")
def two_workers(tiny):
    """Two workers, two micro-batches a step; of three documents that are scored one worker has two."""
    return tiny(*TWO_WORKERS)


@pytest.fixture(scope="module")
def sharded(two_workers):
    return override(two_workers, {"train.arguments.fsdp": True})


def stopped_and_begun_again(train_run, experiment):
    """(outcome, job) of a run that is stopped after its first step and goes on then."""
    with cluster.progress_channel(lambda value: None, lambda message: None) as channel:
        channel.stop()
        stopped, job = train_run(experiment, channel=channel)
    assert (stopped.step, stopped.stopped) == (1, True)
    with cluster.progress_channel(lambda value: None, lambda message: None) as channel:
        return train_run.go_on(job, experiment, channel), job


def failing_to_write(step):
    """A session whose first worker has no room for the weights of that step on its own disk."""

    class Failing(OfGroup):
        def __init__(self):
            super().__init__()
            import errno

            from raylm.training import trainer

            plain = trainer._Trainer._save

            def _save(self, *args, **kwargs):
                if self.session.rank == 0 and self.state.global_step == step:
                    raise OSError(errno.ENOSPC, "No space left on device")
                plain(self, *args, **kwargs)

            trainer._Trainer._save = _save

    return Failing


@pytest.mark.slow
def test_weights_that_one_worker_cannot_write_are_an_error_of_all(sharded, new_job, worker_processes):
    """The others are not left waiting in the collectives of the optimizer's state."""
    job = new_job(override(sharded, {"train.seed": 7}))
    last = sharded.train.max_tokens // sharded.train.batch_tokens
    with pytest.raises(StorageError, match="cannot be written: OSError: .*No space left on device"):
        worker_processes(job, 2, failing_to_write(last))


def elements_here(trainer):
    """How many of the weights a worker has, and how many there are."""
    weights = list(trainer.model.parameters())
    return [sum(w.to_local().numel() for w in weights), sum(w.numel() for w in weights)]


@pytest.fixture(scope="module")
def trained(sharded, new_job, worker_processes, tmp_path_factory):
    marks, job = tmp_path_factory.mktemp("marks"), new_job(sharded)
    outcome = worker_processes(job, 2, noting(elements_here, marks, OfGroup))
    return outcome, job, [json.loads((marks / rank).read_text()) for rank in "01"]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The export of the best checkpoint."""
    outcome, job, _ = trained
    return Path(export.export(job.checkpoints.path(outcome.best["step"]), tmp_path_factory.mktemp("best") / "model"))


def test_sharded_weights_are_scored_by_all_workers_and_exported_as_a_plain_directory(trained, sharded, exported):
    outcome, job, held = trained
    assert held[0][0] + held[1][0] == held[0][1] == held[1][1], "each has its part"
    store = tokens.open_store(job.store)
    section = sharded.eval
    assert perplexity.first_documents(store.validation, section.max_tokens) % 2, "one has more to score than the other"

    network, told = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert (set(told["missing_keys"]), set(told["unexpected_keys"])) == (set(), set())
    context = checkpoint.load(exported).context
    found = perplexity.score(
        network, store.validation, frame=store.frame("auto"), context=context, max_tokens=section.max_tokens
    )
    assert found.perplexity == pytest.approx(outcome.best["perplexity"], rel=1e-5)


def test_each_worker_writes_its_own_shards(trained):
    outcome, job, held = trained
    directory = Path(job.checkpoints.path(outcome.best["step"]))
    files = {file.relative_to(directory).as_posix(): file.stat().st_size for file in directory.rglob("*")}
    for state in ("weights", "optimizer"):
        assert {name for name in files if name.startswith(f"{state}/")} == {
            f"{state}/.metadata",
            f"{state}/__0_0.distcp",
            f"{state}/__1_0.distcp",
        }
        assert all(files[f"{state}/__{rank}_0.distcp"] > 4 * held[rank][0] for rank in (0, 1))
    assert {"scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files.keys()
    assert not {name for name in files if name.endswith((".bin", ".safetensors")) or name == "optimizer.pt"}
    guarded = json.loads((directory / "manifest.json").read_text())["files"]
    assert guarded.keys() == {name for name in files if "." in Path(name).name} - {"manifest.json"}
    assert job.checkpoints.damage(outcome.best["step"]) is None


def test_an_export_has_the_bytes_that_one_worker_would_have_saved(trained, exported, tmp_path):
    """Those of transformers' save_pretrained, which holds the whole model."""
    outcome, job, _ = trained
    network = checkpoint.load(job.checkpoints.path(outcome.best["step"])).model
    network.save_pretrained(tmp_path)
    assert (exported / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_shards_are_merged_into_as_many_files_as_transformers_makes(trained, tmp_path, monkeypatch):
    outcome, job, _ = trained
    directory = job.checkpoints.path(outcome.best["step"])
    loaded = checkpoint.load(directory).model
    network = AutoModelForCausalLM.from_config(loaded.config)  # one that is loaded is saved in another order
    network.load_state_dict(loaded.state_dict())
    network.save_pretrained(tmp_path, max_shard_size="10KB")
    monkeypatch.setattr(shards, "MAX_FILE_SIZE", "10KB")
    with shards.merged(directory) as merged:
        files = {file.name: file.read_bytes() for file in merged.glob("model*")}
        AutoModelForCausalLM.from_pretrained(merged)
    assert len(files) > 2
    assert files == {file.name: file.read_bytes() for file in tmp_path.glob("model*")}
    assert not merged.exists()


def test_a_state_that_would_run_code_is_refused(trained, tmp_path):
    """The metadata is pickled, and a checkpoint may be anybody's."""
    outcome, job, _ = trained
    directory = tmp_path / "from-elsewhere"
    shutil.copytree(job.checkpoints.path(outcome.best["step"]), directory)
    mark = tmp_path / "mark"

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    (directory / "weights" / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(StorageError, match="metadata cannot be read: UnpicklingError: it has posix.mkdir"):
        export.export(directory, tmp_path / "model")
    assert not mark.exists()


def test_damaged_shards_are_an_error_that_names_them(trained, tmp_path):
    outcome, job, _ = trained
    directory = tmp_path / "damaged"
    shutil.copytree(job.checkpoints.path(outcome.best["step"]), directory)
    shard = directory / "weights" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[: len(content) // 2] = bytes(len(content) // 2)
    shard.write_bytes(content)
    with pytest.raises(StorageError, match=f"{directory} cannot be loaded: "):
        export.export(directory, tmp_path / "model")
    shard.unlink()
    with pytest.raises(StorageError, match=f"{directory}: its shards cannot be merged"):
        export.export(directory, tmp_path / "model")


def test_a_sharded_checkpoint_is_scored_and_trained_further_as_it_is(trained, exported, sharded, tiny, new_job):
    outcome, job, _ = trained
    directory = job.checkpoints.path(outcome.best["step"])
    assert api.evaluate(directory, **{"eval.max_tokens": 400}).score.nll == pytest.approx(
        api.evaluate(exported, **{"eval.max_tokens": 400}).score.nll, rel=1e-6
    )
    further = tiny(f"model={{path: {directory}}}", "tokenizer={}", "train.max_tokens=256", "train.learning_rate=1e-12")
    job = new_job(further)
    begun = training.train_loop_per_worker(dataclasses.replace(job, session=training.SingleProcess))
    weights = AutoModelForCausalLM.from_pretrained(job.checkpoints.path(begun.step)).state_dict()
    before = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert all(torch.allclose(weights[name], weight, atol=1e-8) for name, weight in before.items())


# Killed and resumed --------------------------------------------------------------------------------------------------

THREE_STEPS = (
    *TWO_WORKERS,
    "model.config={model_type: gpt2, n_layer: 1, n_head: 2, n_embd: 16, resid_pdrop: 0, embd_pdrop: 0, attn_pdrop: 0}",
    "train.batch_tokens=384",
    "train.max_tokens=1152",
    "train.eval_every_tokens=384",
    "train.micro_batch_tokens=96",
    "train.keep_checkpoints=3",
)
"""Batches of 12 blocks, for one to four workers; without dropout, whose random numbers are those of a worker."""


class KilledInItsSave(OfGroup):
    """The second worker is killed when it has written its weights at the second step, but no state of its optimizer."""

    def __init__(self):
        super().__init__()
        plain = storage.upload

        def upload(file, path):
            if path.endswith("step_00000002/optimizer/__1_0.distcp"):
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(file, path)

        storage.upload = upload


class Examples(OfGroup):
    """Appends the step and the tokens of each example to a file of its worker."""

    def __init__(self):
        super().__init__()
        from raylm.training import trainer

        plain = trainer._Trainer.compute_loss

        def compute_loss(trainer, model, inputs, *args, **kwargs):
            with Path(trainer.task.run.directory, f"examples-{self.world_size}-{self.rank}").open("a") as file:
                for row in inputs["input_ids"].tolist():
                    file.write(json.dumps([trainer.state.global_step, row]) + "\n")
            return plain(trainer, model, inputs, *args, **kwargs)

        trainer._Trainer.compute_loss = compute_loss


def examples_of(job, size):
    """The examples that so many workers have seen, by step."""
    found = [json.loads(line) for file in Path(job.directory).glob(f"examples-{size}-*") for line in file.open()]
    return sorted(found)


def copied_job(job, directory):
    shutil.copytree(job.directory, directory)
    return dataclasses.replace(job, directory=str(directory), run=tracking.Run(str(directory)))


def losses(job):
    return dict(job.run.metric_history()["train/loss"])


@pytest.fixture(scope="module")
def killed(tiny, new_job, worker_processes):
    job = new_job(override(tiny(*THREE_STEPS), {"train.arguments.fsdp": True}))
    assert worker_processes(job, 2, KilledInItsSave) is None
    return job


@pytest.fixture(scope="module")
def whole(tiny, new_job, worker_processes):
    """The same training by DDP."""
    job = new_job(tiny(*THREE_STEPS))
    return worker_processes(job, 2, Examples), job


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_sharded_run_that_is_killed_in_a_save_resumes_with_any_number_of_workers(
    killed, whole, worker_processes, tmp_path, size
):
    assert killed.checkpoints.steps() == [1, 2]
    assert killed.checkpoints.complete() == [1]
    job = copied_job(killed, tmp_path / "run")
    outcome = worker_processes(job, size, Examples)
    reference, ddp = whole
    assert outcome.step == 3
    assert examples_of(job, size) == [each for each in examples_of(ddp, 2) if each[0] > 0]
    assert losses(job) == pytest.approx(losses(ddp), abs=1e-5)
    assert outcome.best["perplexity"] == pytest.approx(reference.best["perplexity"], rel=1e-5)
    shards_written = {file.name for file in Path(job.checkpoints.path(3), "optimizer").glob("*.distcp")}
    assert len(shards_written) == size


class Memory(OfGroup):
    """Notes by how many MiB at most a worker grows while it loads a checkpoint."""

    def __init__(self):
        super().__init__()
        from raylm.training import trainer

        weights, optimizer = (
            getattr(trainer._Trainer, name) for name in ("_load_from_checkpoint", "_load_optimizer_and_scheduler")
        )

        def memory(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 2**10

        def load_weights(trainer, *args, **kwargs):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            self.before = memory("VmRSS")
            return weights(trainer, *args, **kwargs)

        def load_optimizer(trainer, checkpoint):
            optimizer(trainer, checkpoint)
            if checkpoint is not None:
                grown = memory("VmHWM") - self.before
                Path(trainer.task.run.directory, f"grown-{self.world_size}-{self.rank}").write_text(str(grown))

        trainer._Trainer._load_from_checkpoint = load_weights
        trainer._Trainer._load_optimizer_and_scheduler = load_optimizer


LARGE = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
"""126 million parameters: the parts of tensors that are read at once are large beside what else a worker needs."""


@pytest.mark.slow
@pytest.mark.skipif(
    not costs._reset_peak(torch.device("cpu")), reason="the kernel does not let a process reset its peak"
)
def test_a_worker_that_resumes_needs_little_more_memory_than_its_share(tiny, new_job, worker_processes):
    settings = ["model.config=" + json.dumps(LARGE), "train.max_tokens=768", "eval.max_tokens=100"]
    job = new_job(override(tiny(*THREE_STEPS, *settings), {"train.arguments.fsdp": True}))
    worker_processes(job, 2, Memory)
    shutil.rmtree(job.checkpoints.path(2))
    assert worker_processes(job, 4, Memory).step == 2
    share = 4 * sum(load.numel() for load in merged_weights(job, 1)) / 4 / 2**20
    grown = [float(Path(job.directory, f"grown-4-{rank}").read_text()) for rank in range(4)]
    # The weights are there before; the states of AdamW and room for the gradients are three times their size.
    assert 3 * share < min(grown), "this test measures what it should"
    assert max(grown) + share < 1.1 * 4 * share


def merged_weights(job, step):
    with shards.merged(job.checkpoints.path(step)) as directory:
        return load_file(directory / "model.safetensors").values()


@pytest.mark.slow
def test_a_sharded_run_in_object_storage(tiny, new_job, worker_processes, whole, tmp_path):
    """Of remote shards a worker reads the parts that it needs. file:// is as remote as s3:// is."""
    experiment = override(tiny(*THREE_STEPS), {"train.arguments.fsdp": True})
    job = new_job(experiment)
    remote = dataclasses.replace(job, directory=f"file://{tmp_path}/run")
    assert worker_processes(remote, 2, KilledInItsSave) is None
    assert remote.checkpoints.complete() == [1]
    outcome = worker_processes(remote, 3)
    assert losses(job) == pytest.approx(losses(whole[1]), abs=1e-5)
    from_remote = export.export(remote.checkpoints.path(outcome.step), tmp_path / "from_remote")
    from_local = export.export(remote.checkpoints.path(outcome.step).removeprefix("file://"), tmp_path / "from_local")
    assert Path(from_remote, "model.safetensors").read_bytes() == Path(from_local, "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_from_before_shards_were_written_resumes(killed, whole, worker_processes, tmp_path, size):
    """It has what rank 0 had gathered: model.safetensors, and the optimizer's states by the names of the weights."""
    job, local = copied_job(killed, tmp_path / "run"), tmp_path / "local"
    shutil.copytree(job.checkpoints.path(1), local)
    with shards.merged(local) as merged:
        shutil.copy(merged / "model.safetensors", local)
    dcp_to_torch_save(local / "optimizer", local / "optimizer.pt")
    for state in ("weights", "optimizer"):
        shutil.rmtree(local / state)
    job.checkpoints.replace(local, 1)
    outcome = worker_processes(job, size)
    assert outcome.step == 3
    assert losses(job) == pytest.approx(losses(whole[1]), abs=1e-5)
    assert (Path(job.checkpoints.path(3)) / "weights" / ".metadata").exists()


# With other settings --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"train.micro_batch_tokens": 32},
        {"train.arguments.gradient_checkpointing": True},
        {"train.arguments.fsdp_config": {"cpu_offload": True}},
        {"train.arguments.fsdp_config": {"reshard_after_forward": False}},
    ],
    ids=["accumulation", "gradient_checkpointing", "cpu_offload", "no_resharding"],
)
def test_sharded_weights_with_other_settings(tiny, new_job, worker_processes, whole, settings, size):
    job = new_job(override(tiny(*THREE_STEPS), {"train.arguments.fsdp": True, **settings}))
    reference, ddp = whole
    first = worker_processes(job, size)
    assert losses(job) == pytest.approx(losses(ddp), abs=1e-5)
    assert first.best["perplexity"] == pytest.approx(reference.best["perplexity"], rel=1e-5)
    job.checkpoints.discard(3)
    resumed = worker_processes(job, 6 - size)
    assert (resumed.step, losses(job)) == (3, pytest.approx(losses(ddp), abs=1e-5))


@pytest.fixture(scope="module")
def base(whole, tmp_path_factory):
    """A pretrained model."""
    reference, job = whole
    return export.export(job.checkpoints.path(reference.step), tmp_path_factory.mktemp("base") / "model")


def adapting(tiny, base, **lora):
    """An experiment that trains an adapter of the model."""
    settings = json.dumps({"path": base, "lora": {"r": 2, **lora}})
    return tiny(
        *(setting for setting in THREE_STEPS if not setting.startswith("model")), f"model={settings}", "tokenizer={}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["wte"]}], ids=["updates", "modules_to_save"])
def test_an_adapter_of_sharded_weights(tiny, new_job, worker_processes, base, tmp_path, size, more):
    experiment = adapting(tiny, base, **more)
    ddp, job = new_job(experiment), new_job(override(experiment, {"train.arguments.fsdp": True}))
    reference = worker_processes(ddp, 2)
    outcome = worker_processes(job, size)
    assert losses(job) == pytest.approx(losses(ddp), abs=1e-5)
    before = weights_of(tmp_path / "before", ddp, reference.step)
    assert_close(weights_of(tmp_path / "sharded", job, outcome.step), before)
    directory = Path(job.checkpoints.path(outcome.step))
    trained_bytes = sum(file.stat().st_size for file in (directory / "optimizer").glob("*.distcp"))
    if not more:
        assert trained_bytes < sum(file.stat().st_size for file in (directory / "weights").glob("*.distcp"))

    job.checkpoints.discard(3)
    worker_processes(job, 1)
    assert losses(job) == pytest.approx(losses(ddp), abs=1e-5)
    assert_close(weights_of(tmp_path / "resumed", job, 3), before)


def weights_of(place, job, step):
    """The weights in each kind of export of a checkpoint, by file and name."""
    found = {}
    for kind in ("merged", "adapter", "both"):
        copy = place / f"{kind}-checkpoint"
        shutil.copytree(job.checkpoints.path(step), copy)
        described = config.load(copy / "experiment.yaml")
        config.save(override(described, {"model.lora.export": kind}), copy / "experiment.yaml")
        model = Path(export.export(copy, place / kind))
        for file in model.rglob("*.safetensors"):
            found |= {f"{kind}/{file.relative_to(model)}/{name}": each for name, each in load_file(file).items()}
    return found


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    assert any(name.startswith("both/adapter/") for name in found)
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-5), name


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_do(trained, two_workers, new_job, worker_processes):
    outcome, job, _ = trained
    reference = new_job(two_workers)
    whole = worker_processes(reference, 2)
    assert outcome.best["perplexity"] == pytest.approx(whole.best["perplexity"], rel=1e-4)
    for name in ("train/loss", "train/grad_norm"):
        assert dict(job.run.metric_history()[name]) == pytest.approx(
            dict(reference.run.metric_history()[name]), rel=1e-4
        )


@pytest.mark.slow
def test_a_sharded_run_resumes_where_it_was_stopped(trained, sharded, train_run):
    outcome, job, _ = trained
    ended, again = stopped_and_begun_again(train_run, sharded)
    assert ended.best == outcome.best
    assert again.run.metric_history()["train/loss"] == job.run.metric_history()["train/loss"]


@pytest.mark.slow
def test_sharded_weights_in_half_precision(sharded, new_job, worker_processes):
    experiment = override(sharded, {"train.precision": "bfloat16"})
    job = new_job(experiment)
    outcome = worker_processes(job, 2)
    assert outcome.best["perplexity"] == pytest.approx(scored(job, outcome, experiment), rel=1e-6)
    with shards.merged(job.checkpoints.path(outcome.best["step"])) as directory:
        weights = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert weights.dtype == torch.float32, "the weights themselves are kept whole"


def scored(job, outcome, experiment):
    """The perplexity of the best checkpoint as `raylm evaluate` has it."""
    store, saved = tokens.open_store(job.store), job.checkpoints.path(outcome.best["step"])
    count = perplexity.first_documents(store.validation, experiment.eval.max_tokens)
    rows = launch.score(saved, store.validation, experiment, None)
    return perplexity.Score.of(rows[:count]).perplexity


def mixed_precision(trainer):
    return trainer.accelerator.mixed_precision


@pytest.mark.slow
def test_half_precision(tiny, train_run, tmp_path):
    experiment = tiny("train.max_tokens=512", "train.precision=bfloat16")
    outcome, job = train_run(experiment, noting(mixed_precision, tmp_path, training.SingleProcess))
    assert json.loads((tmp_path / "0").read_text()) == "bf16"
    assert outcome.best["perplexity"] == pytest.approx(scored(job, outcome, experiment), rel=1e-6)


@pytest.mark.parametrize("settings", [["train.precision=bfloat16"], ["model.dtype=bfloat16"]])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_scores_are_in_their_own_precision_whatever_that_of_the_training(tiny, train_run, settings, precision):
    """So they are those of `raylm evaluate`, and are recorded with it."""
    experiment = tiny("train.max_tokens=512", f"eval.precision={precision}", *settings)
    outcome, job = train_run(experiment)
    assert outcome.best["perplexity"] == pytest.approx(scored(job, outcome, experiment), rel=1e-6)
    record = checkpoint.read_record(job.checkpoints.path(outcome.best["step"]))
    assert record["scored_in"] == precision
    other = override(experiment, {"eval.precision": "bfloat16" if precision == "float32" else "float32"})
    assert outcome.best["perplexity"] != pytest.approx(scored(job, outcome, other), rel=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler's, mostly
def test_a_compiled_model_trains_as_one_that_is_not(tiny, train_run, tmp_path):
    experiment = tiny("train.max_tokens=512")
    compiled = override(experiment, {"train.compile": "on"})
    outcome, job = train_run(compiled, noting(compiled_graphs, tmp_path, training.SingleProcess))
    plain, _ = train_run(experiment)
    assert json.loads((tmp_path / "0").read_text()) > 0
    assert outcome.best["perplexity"] == pytest.approx(plain.best["perplexity"], rel=0.05)  # dropout differs
    AutoModelForCausalLM.from_pretrained(job.checkpoints.path(outcome.best["step"]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_long_training_is_compiled_and_stays_so_when_it_resumes(tiny, tmp_path, monkeypatch):
    """`raylm train` twice: how long the first takes is not known, how long the second takes is."""
    experiment = tiny("train.compile=auto", f"storage={tmp_path}", "tracking.uri=null", "train.max_tokens=5120")

    def decided(result):
        found = json.loads((Path(result.checkpoint).parent / "decided.json").read_text())
        return found["train.compile"]

    first = api.train(experiment)
    assert decided(first) == "off"
    monkeypatch.setattr(pipeline_training, "COMPILE_SECONDS", 0.0)
    second = api.train(experiment, resume="never")
    assert decided(second) == "on"
    assert second.score == pytest.approx(first.score, rel=0.05)  # dropout differs


def compiled_graphs(trainer):
    """How many graphs torch.compile has made of the model."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # DeepSpeed compiles when it is first imported
def test_states_of_the_optimizer_shared_out_by_deepspeed(two_workers, train_run):
    # Whoever trains with it installs it; no extra of raylm does.
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    auto = dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    settings = {**auto, "zero_optimization": {"stage": 2}}
    experiment = override(two_workers, {"train.arguments.deepspeed": settings})
    plain, _ = train_run(two_workers)
    outcome, job = train_run(experiment)
    assert outcome.best["perplexity"] == pytest.approx(plain.best["perplexity"], rel=1e-4)
    assert list(Path(job.checkpoints.path(outcome.best["step"])).glob("global_step*/zero_pp_rank_1_*"))
    ended, _ = stopped_and_begun_again(train_run, experiment)
    assert ended.best == outcome.best

    settings["zero_optimization"]["stage"] = 3
    with pytest.raises(ConfigError, match=r"stage must be 1 or 2, got 3; train\.arguments\.fsdp=true"):
        training.check_settings(override(two_workers, {"train.arguments.deepspeed": settings}).train)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("train.arguments.deepspeed={zero_optimization: {stage: 2}}", "deepspeed needs deepspeed, which is not"),
        ("train.arguments={fsdp: true, fsdp_config: {version: 1}}", r"fsdp_config\.version must be 2, got 1"),
        (
            "train.arguments={fsdp: true, fsdp_config: {state_dict_type: SHARDED_STATE_DICT}}",
            r"fsdp_config\.state_dict_type must be FULL_STATE_DICT, got SHARDED_STATE_DICT",
        ),
        ("train={compile: on, arguments: {fsdp: true}}", "train.compile must be off with train.arguments.fsdp, got on"),
        (
            "train.arguments={fsdp: true, fsdp_config: {activation_checkpointing: true}}",
            r"activation_checkpointing: .*; set train\.arguments\.gradient_checkpointing=true instead",
        ),
    ],
)
def test_what_cannot_share_out_weights_is_refused_before_anything_starts(tiny, setting, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed, where it is
    with pytest.raises(ConfigError, match=problem):
        training.check_settings(tiny(setting).train)
