"""Tasks of lm-eval in files of one's own, on models of one layer that were never trained; its own evaluation beside."""

import contextlib
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from mlflow import MlflowClient
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from raylm import api, generation, tokenizer, tokens, tracking
from raylm.config import EvalConfig, ModelConfig, TokenizerConfig, TrainedTokenizer
from raylm.errors import ConfigError, DataError, StorageError
from raylm.evaluate import evaluate
from raylm.pipeline import evaluated_model
from raylm.report import report
from raylm.results import trial_table
from raylm.results.trial_table import TrialRow
from raylm.tasks import answers, requests
from raylm.tasks.run import _Answering
from raylm.tokenizer import Frame
from raylm.training import ScoreTask

ANIMALS = "cat dog cow hen fox owl".split()
QUESTIONS = [
    {"question": f"The {animal} sat on", "choices": [" a mat", " the sea", f" a {animal}", " no"], "answer": number % 4}
    for number, animal in enumerate(ANIMALS * 3)
]
DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/animals.jsonl}}}}
test_split: test
"""
"""What all task files have, with the directory to be filled in."""

CHOICE = (
    DATA
    + """
task: animals
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
)
CLOZE = (
    DATA
    + """
task: cloze
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
)
ROLLING = (
    DATA
    + """
task: pages
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}{{{{choices[0]}}}}, and then {{{{question}}}}{{{{choices[1]}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
)
WRITTEN = (
    DATA
    + """
task: written
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["t"], max_gen_toks: 8, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
)
GROUP = """
group: zoo
task: [animals, cloze]
aggregate_metric_list:
  - {{metric: acc, aggregation: mean}}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory of task files, one of each kind, and a group of two of them."""
    directory = tmp_path_factory.mktemp("tasks")
    (directory / "animals.jsonl").write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, text in {"choice": CHOICE, "cloze": CLOZE, "rolling": ROLLING, "written": WRITTEN}.items():
        (directory / f"{name}.yaml").write_text(text.format(directory=directory))
    (directory / "group").mkdir()
    for name, text in {"choice": CHOICE, "cloze": CLOZE, "zoo": GROUP}.items():
        (directory / "group" / f"{name}.yaml").write_text(text.format(directory=directory))
    return directory


def exported(network, directory):
    """A plain model whose tokenizer puts its prefix in front of a text, as every model that raylm exports has it."""
    network.save_pretrained(directory)
    text = " ".join(f"{each['question']}{''.join(each['choices'])}" for each in QUESTIONS)
    made = tokenizer.train([text], TrainedTokenizer(vocab_size=290))
    tokenizer.for_export(made, "auto", network.config.max_position_embeddings).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=["gpt2", "llama", "short"])
def model(request, tmp_path_factory):
    torch.manual_seed(3)
    sizes = {"vocab_size": 290, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.5}
    if request.param == "llama":
        sizes |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        network = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=64))
    else:  # the short one reads neither a whole question nor a whole page
        positions = 8 if request.param == "short" else 64
        network = GPT2LMHeadModel(GPT2Config(**sizes, n_layer=1, n_head=2, n_embd=16, n_positions=positions))
    return exported(network, tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    torch.manual_seed(3)
    sizes = {"vocab_size": 290, "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 64, "initializer_range": 0.5}
    network = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    return exported(network, tmp_path_factory.mktemp("model") / "plain")


def of_lm_eval(model, tasks, *names, **how):
    """lm-eval's own results of the model, in float32."""
    network, known = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    own = HFLM(pretrained=network, tokenizer=known, batch_size=1, **how)
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        manager = TaskManager(include_path=tasks, include_defaults=False)
        patch.setenv("DISABLE_MULTIPROC", "1")  # its pool, forked off a process with threads, may never end
        return lm_eval.simple_evaluate(own, tasks=list(names), task_manager=manager, bootstrap_iters=1000)["results"]


def test_metrics_are_those_of_lm_eval_on_the_same_model(model, tasks):
    """Of whole texts they are those of lm-eval without the tokenizer's prefix, in front of which it puts its own: else
    it scores the prefix, too."""
    names = ["animals", "cloze", "pages"]
    expected = of_lm_eval(model, tasks, *names[:2]) | of_lm_eval(model, tasks, "pages", add_bos_token=False)
    paths = ",".join(f"{tasks}/{name}.yaml" for name in ("choice", "cloze", "rolling"))
    found = evaluate(model, tasks=[paths]).record["tasks"]
    assert list(found) == names
    for name in names:
        for key, value in expected[name].items():
            metric, _, kind = key.partition(",")
            if kind == "none" and isinstance(value, float):
                assert found[name][metric] == pytest.approx(value, rel=1e-4), (name, key)
    assert 0 < found["animals"]["acc"] < 1
    assert (found["animals"]["documents"], found["animals"]["shots"]) == (18, 0)


def test_texts_are_those_of_lm_eval_on_the_same_model(plain, tasks, monkeypatch):
    """A model that was never trained writes no right answer: the texts themselves are compared."""
    own, ours = [], []
    for place, found in ((HFLM, own), (_Answering, ours)):
        write = place.generate_until
        monkeypatch.setattr(place, "generate_until", lambda *args, w=write, f=found: f.extend(w(*args)) or list(f))
    of_lm_eval(plain, tasks, "written")
    score = evaluate(plain, tasks=[f"{tasks}/written.yaml"]).record["tasks"]["written"]
    assert ours == own
    assert len(set(ours)) > 3
    assert max(map(len, ours)) > 3
    assert score == {"exact_match": 0.0, "exact_match_stderr": 0.0, "documents": 18, "shots": 0}


def test_the_shares_of_workers_are_the_whole(plain, monkeypatch):
    """To the last bit, because all score the same batches: each slot is one worker's, each text, too."""
    known = tokenizer.load(plain)
    asked = requests.Requests(lambda text: known(text, add_special_tokens=False)["input_ids"], Frame(0, 0), 64, None)
    for each in QUESTIONS:
        for choice in each["choices"]:
            asked.add_continuation(each["question"], choice)
        asked.add_text(4 * each["question"])
    windows, number = asked.windows(), len(asked.request_of_slot)
    prompts = [f"{each['question']} {number}" for number, each in enumerate(QUESTIONS)]
    settings = generation.resolve_settings(plain, {"do_sample": False, "max_new_tokens": 4})

    def task(rank, size):
        section = EvalConfig(batch_tokens=64)
        session = type("Session", (), {"rank": rank, "world_size": size})
        how = {"loaded": ModelConfig(), "tokenizer": TokenizerConfig(), "cpus": 1, "session": session}
        return ScoreTask(plain, tokens.Encoded(), section, **how)

    whole = answers.likelihoods(windows, number, task(0, 1))
    texts = dict(enumerate(answers.texts(prompts, settings, task(0, 1))))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda _: None)
    shares = [answers.likelihoods(windows, number, task(rank, 3)) for rank in range(3)]
    assert all(0 < np.count_nonzero(share[:, 0]) < number for share in shares)
    assert (sum(shares) == whole).all()
    own = []
    monkeypatch.setattr(answers, "gathered", lambda _, share: own.append(share) or [texts])
    for rank in range(2):
        answers.texts(prompts, settings, task(rank, 2))
    assert sorted([*own[0], *own[1]]) == list(range(len(prompts)))
    assert own[0] | own[1] == texts


@pytest.mark.slow
def test_two_workers_have_the_metrics_of_one(ray_cluster, plain, tasks):
    settings = ["cluster.cpus_per_worker=1", "eval.batch_tokens=64"]
    one = evaluate(plain, settings, tasks=[f"{tasks}/group"]).record
    two = evaluate(plain, [*settings, "cluster.num_workers=2"], tasks=[f"{tasks}/group"]).record
    assert sorted(two["tasks"]) == ["animals", "cloze", "zoo"]
    assert two == one


def test_a_directory_has_its_groups_and_the_tasks_of_none(plain, tasks):
    answer = evaluate(plain, tasks=[f"{tasks}/group"])
    assert list(answer.record) == ["model", "prefix", "scored_in", "tasks"], "and no text to score is asked for"
    found = answer.record["tasks"]
    assert sorted(found) == ["animals", "cloze", "zoo"]
    assert found["zoo"]["acc"] == pytest.approx((found["animals"]["acc"] + found["cloze"]["acc"]) / 2)
    assert (found["zoo"]["documents"], found["zoo"]["shots"]) == (36, 0)
    screen = Console(file=io.StringIO(), width=200)
    for part in answer.view:
        screen.print(part)
    shown = screen.file.getvalue()
    assert re.search(r"^zoo +acc +0\.\d+ ± 0\.\d+ +36 +0$", shown, re.MULTILINE)
    assert re.search(r"^ +acc_norm +0\.\d+ ± 0\.\d+ *$", shown, re.MULTILINE)
    assert evaluate(plain, tasks=[f"{tasks}/group"], dry_run=True).record["tasks"] == ["zoo"]


def test_perplexity_stands_beside(plain, tasks, tmp_path):
    (tmp_path / "a.txt").write_text("The cat sat on a mat")
    both = evaluate(plain, text=[f"{tmp_path}/a.txt"], tasks=[f"{tasks}/choice.yaml"]).record
    alone = evaluate(plain, text=[f"{tmp_path}/a.txt"]).record
    assert both == {**alone, "tasks": both["tasks"]}
    result = api.evaluate(plain, f"{tmp_path}/a.txt", tasks=f"{tasks}/choice.yaml")
    assert result.tasks["animals"].record() == both["tasks"]["animals"]


def test_a_task_that_there_is_not_is_told_with_those_like_it(plain, tasks, tmp_path, monkeypatch):
    def told(item, error):
        with pytest.raises(ConfigError, match=error) as caught:
            evaluate(plain, tasks=[item])
        assert (caught.value.where, caught.value.exit_code) == ("--tasks", 2)

    told(f"{tasks}/gone.yaml", r"gone.yaml: there is no such file or directory")
    (tmp_path / "empty").mkdir()
    told(f"{tmp_path}/empty", r"empty: a task of lm-eval is a file \*.yaml with the field task or group; there is none")
    (tmp_path / "empty" / "a.yaml").write_text("a: 1")
    told(f"{tmp_path}/empty/a.yaml", r"a.yaml: a task of lm-eval is a file \*.yaml .*; it is none")
    (tmp_path / "empty" / "a.yaml").write_text("task: a\nfewshot_config: {a: 1\ndoc_to_text: text")
    told(f"{tmp_path}/empty", r"empty/a.yaml, line 3 is no YAML: expected ',' or '}'")
    told(" , ", r"--tasks: give names")
    known = TaskManager(include_path=tasks, include_defaults=False)  # lm-eval's own 14,683 take 10 s to read
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: known)
    told("animal", r"^--tasks animal: lm-eval knows no such task; did you mean animals\?$")
    told(f"{tasks}/cloze.yaml,zzz", r"zzz: lm-eval knows no such task; `lm-eval ls tasks` lists them")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told("animals", r"^--tasks needs lm-eval: pip install raylm\[tasks\]$")


@pytest.mark.slow
def test_the_names_of_lm_eval_are_known(plain):
    with pytest.raises(ConfigError, match=r"arc_esay: lm-eval knows no such task; did you mean arc_easy,"):
        evaluate(plain, tasks=["arc_esay"])
    assert evaluate(plain, tasks=["arc_easy"], dry_run=True).record["tasks"] == ["arc_easy"]


def test_data_that_is_not_there_is_told(plain, tasks, tmp_path):
    (tmp_path / "choice.yaml").write_text(CHOICE.format(directory=tmp_path))
    missing = r"^--tasks animals \(.*/choice.yaml\): it cannot be loaded: FileNotFoundError: .*animals.jsonl"
    with pytest.raises(DataError, match=missing):
        evaluate(plain, tasks=[f"{tmp_path}/choice.yaml"])


def test_a_file_whose_task_has_the_name_of_another_is_told(plain, tasks, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.yaml").write_text(CHOICE.format(directory=tasks))
    refused = []
    for name in ("one", "two"):
        try:
            evaluate(plain, tasks=[f"{tmp_path}/{name}.yaml"], dry_run=True)
        except ConfigError as error:
            refused.append(error.message)
    assert len(refused) == 1, "lm-eval knows one of both"
    assert ": its task animals has the name of that in " in refused[0]


def test_what_lm_eval_does_not_know_of_generation_is_told(plain, tasks, tmp_path):
    text = WRITTEN.replace("do_sample: false", "do_sample: false, tempo: 3")
    (tmp_path / "written.yaml").write_text(text.format(directory=tasks))
    with pytest.raises(ConfigError, match=r"^--tasks written: generation_kwargs: tempo: not a field"):
        evaluate(plain, tasks=[f"{tmp_path}/written.yaml"])


def test_a_masked_model_is_refused(tasks, tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    network = BertForMaskedLM(BertConfig(vocab_size=290, max_position_embeddings=64, **sizes))
    network.save_pretrained(tmp_path)
    made = tokenizer.train(["a b"], TrainedTokenizer(vocab_size=290, special_tokens=["<|endoftext|>", "<mask>"]))
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^--tasks: .* is a masked model, which has no likelihood of an answer"):
        evaluate(str(tmp_path), tasks=[f"{tasks}/choice.yaml"])


# Windows -------------------------------------------------------------------------------------------------------------


def windows(context, *pairs, prefix=9):
    """(read tokens, scored positions, their targets) of each window; a text's tokens are its letters' numbers."""
    made = requests.Requests(
        lambda text: ["abcdefgh".index(each) for each in text if each != " "], Frame(prefix, 9), context, None
    )
    for pair in pairs:
        made.add_continuation(*pair)
    return [(each.ids.tolist(), each.places.tolist(), each.targets.tolist()) for each in made.windows()]


def test_a_continuation_is_read_behind_prefix_and_context():
    assert windows(8, ("ab", "cd")) == [([9, 0, 1, 2], [2, 3], [2, 3])]
    assert windows(8, ("", "ab")) == [([9, 0], [0, 1], [0, 1])]
    assert windows(8, ("ab", "cd"), prefix=None) == [([0, 1, 2], [1, 2], [2, 3])]
    assert windows(8, ("", "ab"), prefix=None) == [([0], [0], [1])], "nothing predicts the first token"


def test_of_what_is_longer_than_the_context_the_end_is_read():
    assert windows(4, ("abcd", "e")) == [([0, 1, 2, 3], [3], [4])]
    assert windows(2, ("a", "bcde")) == [([2, 3], [0, 1], [3, 4]), ([0, 1], [0, 1], [1, 2])]


def test_letters_of_a_choice_are_one_window():
    assert windows(8, ("ab", "c"), ("ab", "d"), ("ba", "c")) == [
        ([9, 0, 1], [2, 2], [2, 3]),
        ([9, 1, 0], [2], [2]),
    ]


# The run of a model --------------------------------------------------------------------------------------------------


def test_a_run_is_its_model_and_has_its_metrics(tiny, tasks):
    experiment = tiny("name=tasks")
    trained = api.train(experiment, resume="never")
    directory = f"{experiment.storage}/tasks/{trained.run}"
    found = api.evaluate(directory, tasks=f"{tasks}/choice.yaml")
    assert found.plan.model == f"{directory}/model"
    assert found.perplexity == pytest.approx(trained.score, rel=1e-6)
    metrics = tracking.Run(directory).task_scores()
    assert metrics["animals/acc"] == found.tasks["animals"].metrics["acc"]
    assert metrics["animals/acc_stderr"] == found.tasks["animals"].errors["acc"]
    (point,) = tracking.Run(directory).metric_history()["tasks/animals/acc"]
    assert point == (trained.best_step, metrics["animals/acc"])


@pytest.mark.slow
def test_a_sweep_is_its_best_model_whose_metrics_are_in_mlflow_and_its_table(tiny, tasks, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    experiment = tiny("name=tasks", f"tracking.uri={uri}", "tune.space={train.learning_rate: {grid: [1e-4, 2e-2]}}")
    swept = api.tune(experiment, resume="never")
    directory = f"{experiment.storage}/tasks/{swept.sweep}"
    acc = api.evaluate(directory, tasks=f"{tasks}/choice.yaml").tasks["animals"].metrics["acc"]
    results = api.open_sweep(directory)
    best, other = results.trials
    assert (best.tasks["animals/acc"], other.tasks) == (acc, {})
    assert report([directory]).record["trials"][0]["tasks"]["animals/acc"] == acc
    for run in (tracking.Run(directory, uri), tracking.Run(f"{directory}/{best.trial_id}", uri)):
        assert [point.value for point in MlflowClient(uri).get_metric_history(run.run_id, "tasks/animals/acc")] == [acc]
    page = (Path(directory) / "report" / "report.html").read_text()
    assert "animals acc" in page


def test_an_id_of_the_hub_is_taken_from_its_cache(plain, tasks, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--plain" / "snapshots" / "0123"
    shutil.copytree(plain, snapshot)
    (tmp_path / "models--me--plain" / "refs").mkdir()
    (tmp_path / "models--me--plain" / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _, directory = evaluated_model.locate("me/plain")
    assert directory == snapshot
    with pytest.raises(StorageError, match=r"^me/other: there is no such directory, and it is not in this machine's"):
        evaluated_model.locate("me/other")


def test_the_metrics_of_trials_are_columns_of_their_table():
    rows = [
        TrialRow("trial_00000", "completed", 3.0, 1.0, 64, {}, tasks={"animals/acc": 0.5, "animals/acc_stderr": 0.1})
    ]
    rows.append(TrialRow("trial_00001", "completed", 4.0, 1.0, 64, {}))
    column = trial_table.columns(rows, "perplexity")["tasks/animals/acc"]
    assert (column.heading, column.cells) == ("animals acc", ["0.5", "-"])
    assert rows[0].record("perplexity")["tasks"] == {"animals/acc": 0.5, "animals/acc_stderr": 0.1}
    assert "tasks" not in rows[1].record("perplexity")
