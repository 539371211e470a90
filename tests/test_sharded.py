"""Training beyond one device: weights shared out among workers, half precision, compiled models."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ray import cloudpickle
from transformers import AutoModelForCausalLM

from raylm import api, checkpoint, cluster, perplexity, tokens, training
from raylm import plan as plans
from raylm.config import override
from raylm.errors import ConfigError, StorageError
from raylm.pipeline import training as pipeline_training
from raylm.training import launch

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test


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
    return tiny(
        "cluster.num_workers=2",
        "cluster.cpus_per_worker=0.5",
        "train.max_tokens=1024",
        "train.eval_every_tokens=512",
        "train.micro_batch_tokens=64",
        "eval.max_tokens=800",
        "eval.batch_tokens=64",
    )


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

    class Failing(training.RayTrainSession):
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
def test_weights_that_one_worker_cannot_write_are_an_error_of_all(sharded, train_run):
    """The others are not left waiting in the collectives of the optimizer's state."""
    experiment = override(sharded, {"train.seed": 7, "cluster.max_failures": 0})
    last = experiment.train.max_tokens // experiment.train.batch_tokens
    with pytest.raises(StorageError, match="cannot be written: OSError: .*No space left on device"):
        train_run(experiment, failing_to_write(last))


def elements_here(trainer):
    """How many of the weights a worker has, and how many there are."""
    weights = list(trainer.model.parameters())
    return [sum(w.to_local().numel() for w in weights), sum(w.numel() for w in weights)]


@pytest.fixture(scope="module")
def trained(sharded, train_run, tmp_path_factory):
    marks = tmp_path_factory.mktemp("marks")
    outcome, job = train_run(sharded, noting(elements_here, marks))
    return outcome, job, [json.loads((marks / rank).read_text()) for rank in "01"]


def test_sharded_weights_are_scored_by_all_workers_and_kept_as_a_plain_directory(trained, sharded):
    outcome, job, held = trained
    assert held[0][0] + held[1][0] == held[0][1] == held[1][1], "each has its part"
    store = tokens.open_store(job.store)
    section = sharded.eval
    assert perplexity.first_documents(store.validation, section.max_tokens) % 2, "one has more to score than the other"

    directory = Path(job.checkpoints.path(outcome.best["step"]))
    files = {file.name for file in directory.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files
    assert not {file for file in files if file.endswith(".bin")}, "the weights once, and no other pickles"
    torch.load(directory / "optimizer.pt", weights_only=True)
    assert job.checkpoints.damage(outcome.best["step"]) is None

    network, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert (set(told["missing_keys"]), set(told["unexpected_keys"])) == (set(), set())
    context = checkpoint.load(directory).context
    found = perplexity.score(
        network, store.validation, frame=store.frame("auto"), context=context, max_tokens=section.max_tokens
    )
    assert found.perplexity == pytest.approx(outcome.best["perplexity"], rel=1e-5)


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_do(trained, two_workers, train_run):
    outcome, job, _ = trained
    whole, reference = train_run(two_workers)
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
def test_sharded_weights_in_half_precision(sharded, train_run):
    experiment = override(sharded, {"train.precision": "bfloat16"})
    outcome, job = train_run(experiment)
    assert outcome.best["perplexity"] == pytest.approx(scored(job, outcome, experiment), rel=1e-6)
    weights = AutoModelForCausalLM.from_pretrained(job.checkpoints.path(outcome.best["step"]), dtype="auto")
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
    ],
)
def test_what_cannot_share_out_weights_is_refused_before_anything_starts(tiny, setting, problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # as if it were not installed, where it is
    with pytest.raises(ConfigError, match=problem):
        training.check_settings(tiny(setting).train)


def test_updates_of_low_rank_are_not_shared_out(tiny):
    with pytest.raises(ConfigError, match="model.lora cannot be combined with train.arguments.fsdp"):
        plans.resolve(tiny("model.lora={r: 2}", "train.arguments.fsdp=true"))
