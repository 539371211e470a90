"""Training runs on real worker groups; a model of one layer, some seconds each."""

import json
import math
import re
import signal
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import Here, one_by_one
from mlflow import MlflowClient
from ray import cloudpickle
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from raylm import budget, checkpoint, cluster, config, export, summary, tokens, train, training
from raylm import plan as plans
from raylm import tokenizer as tokenizers
from raylm.config import TrainedTokenizer, override
from raylm.errors import ConfigError, DataError, Diverged, OutOfMemory
from raylm.evaluate import evaluate
from raylm.generate import generate
from raylm.perplexity import Score
from raylm.pipeline import stores
from raylm.pipeline import training as pipeline
from raylm.tokens import write
from raylm.training import arguments, launch, trainer


@pytest.fixture(scope="module")
def one_worker(train_run, tiny, text_directory, tmp_path_factory):
    """(experiment, metrics of the best evaluation, its checkpoint, the store, the tracked run)"""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    sets = f"{{first: {text_directory}/00.txt, some: {text_directory}/1*.txt}}"
    experiment = tiny(f"tracking.uri={uri}", f"eval.paths={sets}", "objective.keywords=[cat, far]")
    outcome, job = train_run(experiment)
    job.run.upload(60)
    saved = job.checkpoints.path(outcome.best["step"])
    return experiment, outcome.best, saved, tokens.open_store(job.store), job.run


def test_a_checkpoint_is_a_plain_model_directory_that_knows_its_experiment(one_worker):
    experiment, best, saved, store, _ = one_worker
    assert AutoModelForCausalLM.from_pretrained(saved).config.n_positions == 32
    known = AutoTokenizer.from_pretrained(saved)
    assert (len(known), known.model_max_length) == (len(store.tokenizer), 32)
    assert not {"is_local", "local_files_only"} & {*json.loads(Path(saved, "tokenizer_config.json").read_text())}
    assert checkpoint.read_experiment(saved) == experiment
    assert checkpoint.read_record(saved)["perplexity"] == best["perplexity"]
    assert not list(Path(saved).glob("*.bin")), "no pickles"


def test_it_learned_something(one_worker):
    _, best, _, store, _ = one_worker
    assert best["perplexity"] < len(store.tokenizer) / 2


def test_data_seed_orders_the_examples_and_seed_makes_the_weights(one_worker, tmp_path):
    experiment, _, _, store, run = one_worker

    def built(**seeds):
        """(first weights, the order of the examples, the seed of what is random in them)"""
        seeded = override(experiment, {f"train.{name}": seed for name, seed in seeds.items()})
        task = training.TrainTask(seeded, store.path, budget.for_store(seeded, store), run, str(tmp_path))
        made = trainer.build(task, Here(), tmp_path)
        order = [made.train_dataset.examples.index(number) for number in range(len(made.train_dataset))]
        return made.model.transformer.wte.weight.detach().clone(), order, made.data_collator.seed

    weights, order, random = built(seed=1)
    same_weights, other_order, other_random = built(seed=1, data_seed=2)
    assert torch.equal(weights, same_weights)
    assert order != other_order
    assert random != other_random
    other_weights, same_order, same_random = built(seed=2, data_seed=1)
    assert not torch.equal(weights, other_weights)
    assert (order, random) == (same_order, same_random), "data_seed is seed unless it is given"
    assert summary.parameters(override(experiment, {"train.data_seed": 2}), store)["train.data_seed"] == 2
    assert "train.data_seed" not in summary.parameters(experiment, store)


def test_each_step_is_evaluated_and_reported_once(one_worker):
    """The Trainer evaluates again at the end of the data unless told; the checkpoint would be written over itself."""
    *_, tracked = one_worker
    history = MlflowClient(tracked.uri).get_metric_history(tracked.run_id, "eval/perplexity")
    assert [point.step for point in history] == [2, 4, 6, 8, 10]


def test_every_figure_is_in_mlflow_by_step(one_worker):
    experiment, best, _, _, tracked = one_worker
    client = MlflowClient(tracked.uri)
    names = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens", "eval/perplexity"}
    metrics = client.get_run(tracked.run_id).data.metrics
    assert names | {"eval/bits_per_byte"} <= set(metrics)
    for name in ("perplexity", "bits_per_byte"):
        assert metrics[f"eval/{name}_low"] < metrics[f"eval/{name}"] < metrics[f"eval/{name}_high"]
    history = client.get_metric_history(tracked.run_id, "eval/perplexity")
    assert min(point.value for point in history) == best["perplexity"]
    assert all(
        math.isfinite(point.value) for name in names for point in client.get_metric_history(tracked.run_id, name)
    )
    assert client.get_metric_history(tracked.run_id, "train/tokens")[-1].value == experiment.train.max_tokens


def test_evaluation_sets_and_keywords_are_scored_with_every_evaluation_as_evaluate_does(one_worker):
    _, best, saved, _, tracked = one_worker
    found = evaluate(saved)
    assert list(found.record["sets"]) == ["first", "some"]
    whole = evaluate(saved, ["eval.paths=[]"])
    assert whole.record["perplexity"] == pytest.approx(best["perplexity"], rel=1e-6)
    records = {"eval": whole.record, **{f"eval/{name}": each for name, each in found.record["sets"].items()}}
    for place, record in records.items():
        keywords = record["keywords"]
        figures = {
            "perplexity": record["perplexity"],
            "bits_per_byte": record["bits_per_byte"],
            "keyword_perplexity": keywords["perplexity"],
            "keyword_nll": keywords["nll"] / keywords["tokens"],
        }
        for what, expected in figures.items():
            points = MlflowClient(tracked.uri).get_metric_history(tracked.run_id, f"{place}/{what}")
            assert [point.step for point in points] == [2, 4, 6, 8, 10]
            assert points[best["step"] // 2 - 1].value == pytest.approx(expected, rel=1e-6)


def plain_perplexity(network, split, prefix):
    """That of the validation split, by nothing but the model's logits; its documents fit into the model's context."""
    nll = tokens = 0
    for number in range(len(split)):
        ids = torch.tensor([[prefix, *split[number].tolist()]])
        assert ids.shape[1] <= network.config.n_positions
        with torch.no_grad():
            logits = network(ids).logits[0, :-1].double()
        nll += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    return math.exp(nll / tokens)


def test_exported_low_rank_updates_score_as_in_their_last_evaluation(
    train_run, tiny, text_directory, tmp_path, monkeypatch, capsys
):
    base = tmp_path / "base"
    known = tokenizers.train([file.read_text() for file in text_directory.iterdir()], TrainedTokenizer(vocab_size=300))
    known.save_pretrained(base)
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 512, "initializer_range": 0.2}
    GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **sizes)).save_pretrained(base)
    lora = "{target_modules: [all-linear], modules_to_save: [wte, lm_head], export: both}"
    settings = ["tokenizer.train=null", "model.config=null", f"model.path={base}", f"model.lora={lora}"]
    outcome, job = train_run(tiny(*settings))
    saved, best = job.checkpoints.path(outcome.best["step"]), outcome.best["perplexity"]
    split, prefix = tokens.open_store(job.store).validation, known.eos_token_id
    assert plain_perplexity(AutoModelForCausalLM.from_pretrained(base), split, prefix) > 1.5 * best, (
        "it learned something"
    )
    both = Path(export.export(saved, tmp_path / "both"))
    changed = override(checkpoint.read_experiment(saved), {"model.lora.export": "adapter"})
    config.save(changed, Path(saved) / "experiment.yaml")
    adapter = Path(export.export(saved, tmp_path / "adapter"))
    for directory in (both, adapter):
        assert evaluate(str(directory)).record["perplexity"] == pytest.approx(best, rel=1e-6)
    merged = AutoModelForCausalLM.from_pretrained(both)
    assert plain_perplexity(merged, split, prefix) == pytest.approx(best, rel=1e-5)
    for directory in (both / "adapter", adapter):
        network = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory).eval()
        assert plain_perplexity(network, split, prefix) == pytest.approx(best, rel=1e-5)
    assert len(generate(str(adapter), ["max_new_tokens=3"], prompt=["the cat"]).record["texts"]) == 1
    monkeypatch.chdir(adapter)
    exec(re.search(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)[1], {})
    assert "Once upon a time" in capsys.readouterr().out, "the card's own words on how to load it"


def test_two_workers_train_on_the_same_examples_to_the_same_perplexity(one_worker, train_run):
    """Dropout off, since each worker draws its own; what is left is the rounding of sums."""
    experiment, *_ = one_worker
    still = {f"model.config.{name}": 0.0 for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    one = override(experiment, {**still, "tracking.uri": None, "cluster.cpus_per_worker": 0.5})
    two = override(one, {"cluster.num_workers": 2})
    alone, _ = train_run(one)
    together, _ = train_run(two)
    assert together.best["step"] == alone.best["step"]
    assert together.best["perplexity"] == pytest.approx(alone.best["perplexity"], rel=1e-4)


def test_the_same_score_from_one_process_and_from_two_workers(one_worker, ray_cluster):
    import ray

    experiment, best, saved, store, _ = one_worker
    alone = Score.of(launch.score(saved, store.validation, experiment, None))
    assert alone.perplexity == pytest.approx(best["perplexity"], rel=1e-6)
    two = override(experiment, {"cluster.num_workers": 2, "eval.batch_tokens": 64})
    resources = cluster.resources(two.cluster, ray.cluster_resources())
    shared = Score.of(launch.score(saved, store.validation, two, resources))
    assert (shared.tokens, shared.bytes) == (alone.tokens, alone.bytes)
    assert shared.nll == pytest.approx(alone.nll, rel=1e-6)
    assert shared.keyword_tokens == alone.keyword_tokens > 0
    assert shared.keyword_nll == pytest.approx(alone.keyword_nll, rel=1e-6)


class StopsWhenAsked(cluster.ProgressChannel):
    """Says at the n-th time that it is asked, and later, that the training shall stop."""

    def __init__(self, times=None):
        super().__init__()
        self.left = times
        self.asked = 0

    def is_stopping(self):
        self.asked += 1
        return self.left is not None and self.asked >= self.left


@pytest.mark.parametrize("in_last_one", [False, True])
def test_an_evaluation_is_broken_off_and_made_when_the_run_resumes(train_run, tiny, monkeypatch, in_last_one):
    from raylm.training import trainer

    monkeypatch.setattr(trainer, "STOP_CHECK_SECONDS", 0.0)
    experiment = tiny("eval.batch_tokens=64", "train.patience=9")
    counting = StopsWhenAsked()
    reference, whole = train_run(experiment, channel=counting)
    # Asked after each of two steps, then before each batch that is scored; last when there is none left to score.
    stopped, job = train_run(experiment, channel=StopsWhenAsked(counting.asked - 1 if in_last_one else 4))
    assert (stopped.step, stopped.stopped) == (10 if in_last_one else 2, True)
    assert len(job.run.metric_history().get("eval/perplexity", [])) == (4 if in_last_one else 0)
    ended = train_run.go_on(job, experiment)
    for found, expected in ((ended.best, reference.best), (ended.last, reference.last)):
        assert {**found, "seconds": None} == {**expected, "seconds": None}
    for name in ("eval/perplexity", "train/loss"):
        assert job.run.metric_history()[name] == whole.run.metric_history()[name]
    assert job.checkpoints.damage(ended.best["step"]) is None


@pytest.mark.slow
def test_two_workers_make_the_evaluation_that_was_broken_off(train_run, tiny):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers have the channel's class from there
    experiment = tiny("cluster.num_workers=2", "eval.batch_tokens=64", "name=broken-off")
    reference, _ = train_run(experiment)
    stopped, job = train_run(experiment, channel=StopsWhenAsked(2))  # the first time is after the first step
    assert (stopped.step, stopped.stopped) == (2, True)
    assert "eval/perplexity" not in job.run.metric_history()
    ended = train_run.go_on(job, experiment)
    assert {**ended.best, "seconds": None} == {**reference.best, "seconds": None}
    assert [step for step, _ in job.run.metric_history()["eval/perplexity"]] == [2, 4, 6, 8, 10]


def test_divergence_is_an_error_that_names_step_and_setting(train_run, tiny):
    experiment = tiny("train.learning_rate=1e30", "train.warmup_steps=0", "train.arguments.max_grad_norm=1e30")
    with pytest.raises(Diverged, match=r"diverged: .* at step \d+; lower train.learning_rate=1e\+30"):
        train_run(experiment)


def test_arguments_of_the_trainer_are_checked(tiny):
    with pytest.raises(ConfigError, match=r"train.arguments.optimm: not a field .* did you mean optim\?"):
        training.check_settings(tiny("train.arguments.optimm=sgd").train)
    with pytest.raises(ConfigError, match=r"train.arguments.learning_rate is derived.*set train.learning_rate"):
        training.check_settings(tiny("train.arguments.learning_rate=1").train)
    with pytest.raises(ConfigError, match=r"train.arguments.ddp_timeout must be a whole number of seconds.*, got 0"):
        training.check_settings(tiny("train.arguments.ddp_timeout=0").train)
    with pytest.raises(
        ConfigError, match=r"train.optimizer must be adamw, muon or .*, got 'adamww'; did you mean adamw"
    ):
        training.check_settings(tiny("train.optimizer=adamww").train)
    with pytest.raises(ConfigError, match=r"train.lr_scheduler_type must be one of .*cosine.*, got 'cosinus'"):
        training.check_settings(tiny("train.lr_scheduler_type=cosinus").train)


def test_a_schedule_gets_the_arguments_that_it_needs_or_is_refused(tiny):
    from transformers import SchedulerType, get_scheduler

    from raylm.training import arguments

    def schedule(kind, given):
        experiment = tiny(f"train.lr_scheduler_type={kind}", f"train.arguments.lr_scheduler_kwargs={given}")
        training.check_settings(experiment.train)
        planned = budget.compute(experiment.train, block_size=32, num_workers=1, epoch_examples=None)
        made = arguments.build(experiment, planned, "/nowhere")
        weights = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        rates = get_scheduler(kind, weights, 0, planned.steps, made.lr_scheduler_kwargs).lr_lambdas[0]
        return [round(rates(step), 2) for step in range(planned.steps + 1)]

    for kind in set(SchedulerType) - set(arguments.BY_SCORE) - {SchedulerType.CONSTANT}:
        assert len(schedule(kind.value, "{}")) == 11
    assert schedule("warmup_stable_decay", "{}") == [1.0] * 10 + [0.0]
    assert schedule("warmup_stable_decay", "{num_decay_steps: 4}") == [1.0] * 7 + [0.5, 0.29, 0.13, 0.0]
    assert schedule("cosine_with_min_lr", "{}")[-1] == 0.1
    assert schedule("cosine_with_min_lr", "{min_lr: 0.5}")[-1] == 0.5
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs=.* is not what .*=linear takes: .*num_decay_steps"):
        schedule("linear", "{num_decay_steps: 4}")


def test_an_optimizer_of_a_package_that_is_not_there_is_refused_before_anything_starts(tiny):
    with pytest.raises(ConfigError, match=r"^train.optimizer=adamw_bnb_8bit: .*pip install -U bitsandbytes"):
        training.check_settings(tiny("train.optimizer=adamw_bnb_8bit").train)
    training.check_settings(tiny("train.optimizer=adafactor").train)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("train.arguments.use_liger_kernel=true", "arguments.use_liger_kernel"),
        ("train.arguments.parallelism_config={cp_size: 2}", "arguments.parallelism_config"),
        ("train.optimizer=schedule_free_adamw", "optimizer=schedule_free_adamw:"),
        ("train.optimizer=adalomo", "optimizer=adalomo:"),
        ("train.optimizer=galore_adamw_layerwise", "optimizer=galore_adamw_layerwise:"),
        ("train.arguments.accelerator_config.split_batches=true", "arguments.accelerator_config.split_batches:"),
        (
            "train.arguments.accelerator_config={gradient_accumulation_kwargs: {num_steps: 4}}",
            "arguments.accelerator_config.gradient_accumulation_kwargs.num_steps:",
        ),
        ("train.arguments.dataloader_in_order=false", "arguments.dataloader_in_order:"),
    ],
)
def test_arguments_with_which_numbers_would_be_wrong_are_refused_in_the_plan(setting, key, tiny):
    with pytest.raises(ConfigError, match=rf"^train\.{key}"):
        plans.resolve(tiny(setting))


def test_arguments_that_change_no_number_are_taken(tiny):
    training.check_settings(
        tiny("train.arguments.use_liger_kernel=false", "train.arguments.accelerator_config={}").train
    )


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "auto"])
def test_tf32_is_not_demanded_of_a_gpu_that_may_not_have_it(precision, tiny, monkeypatch):
    """TrainingArguments refuses it on GPUs before Ampere; scorer.set_tf32 sets it where it is."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert "tf32" not in arguments.precision(tiny(f"train.precision={precision}").train, on_gpu=True)


def test_the_best_evaluation_and_the_last_steps_are_checkpoints(train_run, tiny):
    experiment = tiny("train.save_every_tokens=2048", "train.keep_checkpoints=1")  # steps 8 and 10; the best may be any
    outcome, job = train_run(experiment)
    saved = job.checkpoints.path(outcome.best["step"])
    assert checkpoint.read_record(saved)["perplexity"] == outcome.best["perplexity"]
    assert job.checkpoints.steps() == sorted({outcome.best["step"], 10})


def test_sizes_that_do_not_fit_are_reported_before_ray_starts(tiny):
    for setting in (
        "model.config.n_head=3",
        "model.config.model_type=t5",
        "train.lr_scheduler_type=reduce_lr_on_plateau",
    ):
        with pytest.raises(ConfigError, match=r"^model(\.config.*)?: |^train\.lr_scheduler_type must be one of "):
            plans.resolve(tiny(setting))


def test_no_validation_text_is_an_error(ray_cluster, tiny, tmp_path):
    (tmp_path / "one.txt").write_text("the only document, which is long enough for a block or two of tokens " * 20)
    experiment = tiny(f"corpus.paths={tmp_path}", "corpus.validation_fraction=0")
    store, _ = stores.prepare(plans.resolve_tokens(experiment))
    with pytest.raises(DataError, match="validation split is empty.*corpus.validation_fraction=0"):
        budget.for_store(experiment, store)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("corpus.test_fraction=1e-6", "the text has few documents, and corpus.test_fraction=1e-06 of them is none"),
        ("corpus.test_paths={}/empty.txt", r"corpus.test_paths=\S+/empty.txt holds no text"),
    ],
)
def test_an_empty_test_split_is_an_error(ray_cluster, tiny, tmp_path, setting, says):
    (tmp_path / "empty.txt").write_text(" \n")
    planned = plans.resolve_tokens(tiny(setting.format(tmp_path), f"storage={tmp_path}"))
    store, _ = stores.prepare(planned)
    with pytest.raises(DataError, match=f"^the test split is empty, .*: {says}; ") as error:
        budget.for_store(planned.experiment, store)
    assert error.value.where == setting.partition("=")[0]
    assert list(stores.warnings(planned, store)) == [error.value.message]


def test_a_plan_starts_no_ray_and_writes_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = plans.resolve(tiny(f"storage={tmp_path}/runs")).record()
    assert record["steps"] == 10
    assert record["tokens"] == 2560
    assert record["parameters"] == 300 * 16 + 32 * 16 + 12 * 16 * 16 + 13 * 16 + 2 * 16
    assert json.dumps(record)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_refuses_what_ray_would_find_out_late(tiny):
    with pytest.raises(ConfigError, match="cluster.num_workers"):
        plans.resolve(tiny("cluster.num_workers=1024", "train.batch_tokens=32768", "train.max_tokens=32768"))
    with pytest.raises(ConfigError, match="blocks.block_size must be at most 16"):
        plans.resolve(tiny("model.config.n_positions=16"))
    with pytest.raises(DataError, match=r"corpus.paths.*nowhere"):
        plans.resolve(tiny("corpus.paths=/nowhere/*.txt"))


def test_the_store_outlives_its_process(one_worker):
    *_, store, _ = one_worker
    assert tokens.open_store(store.path).fingerprint == store.fingerprint


def test_a_run_that_is_stopped_in_its_last_step_stops(ray_cluster, tiny, tmp_path, monkeypatch):
    """It has a score and an export left to do, which the same command does."""
    fit = launch.fit

    def interrupted(*args, **options):
        outcome = fit(*args, **options)
        signal.raise_signal(signal.SIGINT)
        return outcome

    config.save(tiny(f"storage={tmp_path}"), tmp_path / "tiny.yaml")
    monkeypatch.setattr(write, "_each", one_by_one)
    with monkeypatch.context() as last_step:
        last_step.setattr(launch, "fit", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped after step 10, which is saved; the same command resumes"):
            train.train(config=tmp_path / "tiny.yaml")
    result = train.train(config=tmp_path / "tiny.yaml").record
    assert (result["resumed_from"], result["steps"]) == (10, 10)


@pytest.mark.parametrize(("where", "is_over"), [("eval.batch_tokens", False), ("blocks.block_size", True)])
def test_a_run_that_lacks_memory_can_be_resumed_if_a_free_setting_helps(
    ray_cluster, tiny, tmp_path, monkeypatch, where, is_over
):
    def trained(*_):
        raise OutOfMemory("out of memory", where)

    monkeypatch.setattr(pipeline, "_train", trained)
    config.save(tiny(f"storage={tmp_path}"), tmp_path / "tiny.yaml")
    monkeypatch.setattr(write, "_each", one_by_one)
    with pytest.raises(OutOfMemory):
        train.train(config=tmp_path / "tiny.yaml")
    (directory,) = (tmp_path / "tiny").iterdir()
    assert (directory / "result.json").exists() == is_over
