"""Labels by hand on small rows; losses against plain cross entropy; a step of the real Trainer however it is split."""

import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainingArguments,
)

from raylm import objective, tokenizer
from raylm import plan as plans
from raylm.config import BlocksConfig, ObjectiveConfig, TrainedTokenizer
from raylm.errors import ConfigError
from raylm.objective import IGNORED, keywords, loss
from raylm.objective.batches import Example
from raylm.training.trainer import _Trainer

SPECIAL = ("<|endoftext|>", "<mask>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>")
PADDED = BlocksConfig(block_size=16, packing="padded")


def byte_tokenizer():
    """A token a byte, and a few merges: "fit" is three tokens or one, " pd" two."""
    return tokenizer.train(["plt plt plt plt"], TrainedTokenizer(vocab_size=265, special_tokens=SPECIAL))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are quicker on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def byte():
    return byte_tokenizer()


def batches(tokens, cut=PADDED, seed=0, **settings):
    return objective.build(ObjectiveConfig(**settings), cut, tokens, tokenizer.frame(tokens), seed)


def ids(tokens, text):
    return np.array(tokens(text, add_special_tokens=False)["input_ids"])


# Labels and weights --------------------------------------------------------------------------------------------------


def test_the_first_token_of_a_block_is_not_predicted(byte):
    batch = batches(byte)([Example(0, np.array([5, 6, 7])), Example(1, np.array([8, 9, 10]))])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [IGNORED, 9, 10]]


def test_keywords_count_with_and_without_a_space_and_as_sequences(byte):
    count = objective.Keywords(["plt", "fit"], byte)
    assert [len(ids(byte, word)) for word in ("plt", " plt", "fit")] == [1, 1, 3]
    for text, number in {"plt plt": 2, "x.fit(plt)": 2, "fi t": 0, " fit": 1, "": 0, "fitfit": 2}.items():
        assert count.occurrences(ids(byte, text)) == number, text


def test_a_keyword_that_spells_a_special_token_is_text_as_in_a_document(byte):
    spelled = byte("<|endoftext|>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    words = objective.Keywords(["<|endoftext|>"], byte)
    assert words.occurrences(np.array([*spelled, byte.eos_token_id])) == 1
    assert not words.marked(np.array([byte.eos_token_id])).any()


def test_the_tokens_of_a_keyword_are_marked(byte):
    words = objective.Keywords(["plt", "fit"], byte)
    row = ids(byte, "x.fit(plt) fi plt")
    assert byte.convert_ids_to_tokens(row) == ["x", ".", "f", "i", "t", "(", "plt", ")", "Ġ", "f", "i", "Ġplt"]
    assert words.marked(row).tolist() == [False, False, True, True, True, False, True, *[False] * 4, True]
    assert words.marked(ids(byte, "fi")).tolist() == [False, False]
    assert objective.Keywords((), byte).marked(row).sum() == 0
    overlapping = objective.Keywords(["aba"], byte)
    assert overlapping.marked(ids(byte, "cababac")).tolist() == [False, *[True] * 5, False]


class Rows(list):
    """What NumberedExamples asks of a Stream, over rows."""

    def rows(self, numbers):
        return [self[number] for number in numbers]

    def marks(self, numbers):
        return None


class Shards:
    """A split of these shards, each of documents."""

    def __init__(self, *shards):
        self.made = [
            (np.concatenate(shard).astype(np.uint16), np.cumsum([0, *map(len, shard)]).astype(np.int32))
            for shard in shards
        ]
        self.shards = [(len(shard), len(values)) for shard, (values, _) in zip(shards, self.made, strict=True)]
        self.read = []

    def arrays(self, shard):
        self.read.append(shard)
        return self.made[shard]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 1 << 20])
def test_a_keyword_is_absent_if_no_document_has_all_its_tokens_in_a_row(byte, chunk, monkeypatch):
    monkeypatch.setattr(keywords, "CHUNK", chunk)
    split = Shards(
        [ids(byte, "x.f"), ids(byte, "it y predi"), ids(byte, "ct")],
        [ids(byte, "the plt"), ids(byte, "predict"), ids(byte, "f")],
        [ids(byte, "it")],
    )
    words = objective.Keywords(["plt", "fit", "predict", "Plt", "t"], byte)
    assert words.absent(split) == ["fit", "Plt"]
    assert split.read == [0, 1, 2]
    split.read.clear()
    assert objective.Keywords(["it", "x"], byte).absent(split) == []
    assert split.read == [0], "nothing is read after the last one is found"


def test_a_keyword_that_the_corpus_does_not_have_is_warned_of(byte):
    store = SimpleNamespace(tokenizer=byte, train=Shards([ids(byte, "the plt and the [sk]")]))
    settings = ObjectiveConfig(kind="keyword_weighted", keywords=["plt", "[pd]", "[sk]"])
    (warning,) = objective.warnings(settings, store)
    assert "objective.keywords: no document of the training split has '[pd]', so it makes" in warning


def test_weights_are_of_the_row_and_items_of_the_batch(byte):
    rows = [Example(0, ids(byte, "plt plt")), Example(1, ids(byte, "abcd"))]  # 1 prediction, 3 predictions
    weighted = batches(byte, kind="keyword_weighted", keywords="plt", alpha=0.5)
    batch = weighted(rows)
    assert batch["weights"].tolist() == [1.5, 0.5]
    assert weighted.items(batch) == 1 * 1.5 + 3 * 0.5
    course = batches(byte, kind="keyword_weighted", keywords="plt", alpha=0.5, normalize=False)
    batch = course(rows)
    assert batch["weights"].tolist() == pytest.approx([1.5 / 1, 0.5 / 3])
    assert course.items(batch) == 2


def test_masked_tokens_are_drawn_by_seed_and_number_alone(byte):
    rows = [Example(number, np.random.default_rng(number).integers(10, 200, 12 - number)) for number in range(4)]
    masked = batches(byte, kind="masked", probability=0.5)
    whole = masked(rows)
    for number, row, _ in rows:
        alone = masked([Example(number, row)])
        assert whole["input_ids"][number, : len(row)].tolist() == alone["input_ids"][0].tolist()
        assert whole["labels"][number, : len(row)].tolist() == alone["labels"][0].tolist()
    other = batches(byte, kind="masked", probability=0.5, seed=1)(rows)
    assert whole["labels"].tolist() != other["labels"].tolist()
    assert masked([Example(9, rows[0][1])])["labels"].tolist() != whole["labels"][:1].tolist(), "anew each epoch"


def test_of_the_masked_tokens_eight_in_ten_are_hidden(byte):
    row = np.random.default_rng(0).integers(10, 200, 40_000)
    row[::7] = byte.eos_token_id
    shown, labels = batches(byte, kind="masked").masked(0, row)
    chosen = labels != IGNORED
    assert np.array_equal(labels[chosen], row[chosen])
    assert np.array_equal(shown[~chosen], row[~chosen])
    assert not chosen[::7].any(), "special tokens are not predicted"
    assert chosen.sum() / (len(row) * 6 / 7) == pytest.approx(0.15, abs=0.005)
    hidden, same = shown[chosen] == byte.mask_token_id, shown[chosen] == row[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.02)
    assert same.mean() == pytest.approx(0.1, abs=0.02)


def test_padding_is_never_masked(byte):
    batch = batches(byte, kind="masked", probability=0.9)(
        [Example(0, np.arange(10, 22)), Example(1, np.arange(10, 12))]
    )
    assert (batch["labels"][1, 2:] == IGNORED).all()
    assert batch["attention_mask"][1].tolist() == [1, 1] + [0] * 10


@pytest.mark.parametrize(("spm_rate", "order"), [(0.0, "PSM"), (1.0, "SPM")])
def test_fill_in_middle_reorders_a_document_and_keeps_its_tokens(byte, spm_rate, order):
    fill = batches(byte, BlocksConfig(block_size=64), kind="fill_in_middle", rate=1.0, spm_rate=spm_rate)
    prefix_id, middle_id, suffix_id = fill.sentinel_ids
    assert byte.convert_ids_to_tokens(fill.sentinel_ids) == ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    document = np.arange(20, 40)
    row = np.append(document, byte.eos_token_id)
    for number in range(20):
        made = fill.transformed(number, row).tolist()
        assert (made[0], made[-1], len(made)) == (prefix_id, byte.eos_token_id, len(row) + 3)
        middle_at, suffix_at = made.index(middle_id), made.index(suffix_id)
        if order == "PSM":
            prefix, suffix, middle = made[1:suffix_at], made[suffix_at + 1 : middle_at], made[middle_at + 1 : -1]
            assert prefix + middle + suffix == document.tolist()
        else:
            assert suffix_at == 1
            assert made[middle_at + 1 : -1] + made[2:middle_at] == document.tolist()


def test_fill_in_middle_stays_in_documents_and_blocks(byte):
    row = np.array([20, 21, 22, 0, 30, 31, 32, 0, 40, 41])
    assert byte.eos_token_id == 0
    always = batches(byte, BlocksConfig(block_size=10), kind="fill_in_middle", rate=1.0)
    assert len(always.transformed(3, row)) == 10
    roomy = batches(byte, BlocksConfig(block_size=99), kind="fill_in_middle", rate=1.0)
    parts = "".join(chr(token) for token in roomy.transformed(3, row)).split(chr(0))
    assert [{ord(letter) for letter in part} & {20, 21, 22, 30, 31, 32, 40, 41} for part in parts] == [
        {20, 21, 22}, {30, 31, 32}, {40, 41},
    ]  # fmt: skip
    never = batches(byte, BlocksConfig(block_size=10), kind="fill_in_middle", rate=0.0)
    assert never.transformed(3, row).tolist() == row.tolist()


def test_half_of_the_documents_at_a_rate_of_half(byte):
    fill = batches(byte, BlocksConfig(block_size=64), kind="fill_in_middle", rate=0.5)
    moved = sum(len(fill.transformed(number, np.arange(20, 30))) > 10 for number in range(1000))
    assert 440 < moved < 560


def test_what_the_tokenizer_lacks_is_named_with_a_way_out():
    plain = tokenizer.train(["a"], TrainedTokenizer(vocab_size=257))
    with pytest.raises(ConfigError, match=r"no mask token.*tokenizer.train.special_tokens=.*<mask>"):
        batches(plain, kind="masked")
    with pytest.raises(ConfigError, match=r"no <fim_prefix> <fim_middle> <fim_suffix>; .*special_tokens="):
        batches(plain, kind="fill_in_middle")
    with pytest.raises(ConfigError, match=r"needs words: objective.keywords="):
        batches(plain, kind="keyword_weighted")
    with pytest.raises(ConfigError, match=r"blocks.isolate_documents"):
        batches(byte_tokenizer(), BlocksConfig(isolate_documents=True), kind="masked")
    planned = TrainedTokenizer(special_tokens=("<|endoftext|>", "[MASK]"))
    objective.check_settings(ObjectiveConfig(kind="masked"), PADDED, planned)
    with pytest.raises(ConfigError, match=r"objective.sentinels: .* no <fim_prefix>"):
        objective.check_settings(ObjectiveConfig(kind="fill_in_middle"), PADDED, planned)


def test_a_plan_refuses_what_the_tokenizer_to_be_trained_will_lack(tiny):
    for settings, message in {
        "objective.kind=masked": "no mask token",
        "objective.kind=fill_in_middle": "no <fim_prefix>",
        "objective.kind=keyword_weighted": "needs words",
    }.items():
        with pytest.raises(ConfigError, match=message):
            plans.resolve(tiny(settings))


# Losses --------------------------------------------------------------------------------------------------------------


def network(kind="gpt2", vocab_size=265, hidden=8, **fields):
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": vocab_size}
    if kind == "gpt2":
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=hidden, n_positions=32, **ids, **still, **fields))
    sizes = {"hidden_size": hidden, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, **ids}
    if kind == "bert":
        still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32}
        return BertForMaskedLM(BertConfig(**sizes, **still))
    kinds = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "granite": (GraniteConfig, GraniteForCausalLM),
        "gemma2": (Gemma2Config, Gemma2ForCausalLM),
    }
    config, model = kinds[kind]
    return model(config(**sizes, num_key_value_heads=1, head_dim=8, **fields))


def gradient(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def both_ways(model, batch, shifted=True):
    """((loss, gradient) by raylm, the same by plain logits and cross entropy)"""
    inputs = {name: values for name, values in batch.items() if name in ("input_ids", "attention_mask")}
    logits = model(**inputs).logits.float()
    labels = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED) if shifted else batch["labels"]
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    if "weights" in batch:
        each = each * batch["weights"][:, None]
    each.sum().backward()
    plain = each.sum().item(), gradient(model)
    model.zero_grad()
    objective.attach(model, shifted=shifted)
    ours = model(**batch)["loss"]
    ours.backward()
    return (ours.item(), gradient(model)), plain


@pytest.mark.parametrize("kind", ["gpt2", "llama", "granite", "gemma2", "bert"])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_gradient_equal_those_of_plain_logits(kind, weighted, byte):
    fields = {"granite": {"logits_scaling": 7.0}, "gemma2": {"final_logit_softcapping": 0.01}}.get(kind, {})
    model = network(kind, **fields)
    settings = {"kind": "masked", "probability": 0.5} if kind == "bert" else {}
    rows = [Example(k, np.random.default_rng(k).integers(10, 265, 16 - k)) for k in range(4)]
    batch = batches(byte, **settings)(rows)
    if weighted:
        batch["weights"] = torch.tensor([1.0, 3.0, 0.5, 2.0])
    (ours, gradients), (plain, plain_gradients) = both_ways(model, batch, shifted=kind != "bert")
    assert ours == pytest.approx(plain, rel=1e-6)
    assert gradients.keys() == plain_gradients.keys()
    for name, found in gradients.items():
        torch.testing.assert_close(found, plain_gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_chunks_are_used_only_where_the_head_alone_makes_the_logits():
    def makes_logits(model):
        objective.attach(model, shifted=True)
        head = model.get_output_embeddings()
        assert head.makes_logits is None, "nothing runs before the model is where it is trained"
        model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None])
        return head.makes_logits

    assert makes_logits(network("gpt2"))
    assert makes_logits(network("bert"))
    assert not makes_logits(network("granite", logits_scaling=7.0))
    assert not makes_logits(network("gemma2", final_logit_softcapping=30.0))
    weight = torch.empty(265, 8)
    assert loss.chunks_pay(8, weight)
    assert not loss.chunks_pay(7, weight)


def test_logits_of_a_batch_are_never_held(byte, monkeypatch):
    """No tensor of as many numbers as the logits is kept for backward."""
    model = network("gpt2", vocab_size=2000)
    objective.attach(model, shifted=True)
    batch = batches(byte)([Example(k, np.random.default_rng(k).integers(10, 265, 16)) for k in range(8)])
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: (sizes.append(saved.numel()), saved)[1], lambda x: x):
        model(**batch)["loss"].backward()
    assert max(sizes) < 8 * 16 * 2000


def test_in_bfloat16_the_sum_keeps_its_digits(byte):
    batch = batches(byte)([Example(k, np.random.default_rng(k).integers(10, 265, 16)) for k in range(8)])
    exact = network("gpt2")
    objective.attach(exact, shifted=True)
    expected = exact(**batch)["loss"].item()
    rounded = network("gpt2").bfloat16()
    objective.attach(rounded, shifted=True)
    assert rounded(**batch)["loss"].item() == pytest.approx(expected, rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = exact(**batch)["loss"]
    mixed.backward()
    assert mixed.item() == pytest.approx(expected, rel=1e-3)
    unread = exact.lm_head.weight.grad[:10]  # of tokens that are not in the batch: from the head alone
    assert unread.dtype == torch.float32
    assert torch.equal(unread, unread.bfloat16().float()), "the head ran in float32 under autocast"


def test_the_balance_of_experts_is_learned_and_not_scored(byte):
    """As transformers' own loss has it: the mean over tokens, and the coefficient times the load-balancing loss."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "vocab_size": 265,
    }
    config = MixtralConfig(**sizes, num_key_value_heads=1, output_router_logits=True, router_aux_loss_coef=0.5)
    torch.manual_seed(0)
    model = MixtralForCausalLM(config)
    batch = batches(byte)([Example(k, np.random.default_rng(k).integers(10, 265, 16)) for k in range(4)])
    theirs = model(input_ids=batch["input_ids"], labels=batch["input_ids"])
    plain = theirs.loss - 0.5 * theirs.aux_loss
    assert theirs.aux_loss > 1
    objective.attach(model, shifted=True)
    items = batches(byte).items(batch)
    assert (model(**batch)["loss"] / items).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    weighted = {**batch, "weights": torch.tensor([2.0, 2.0, 2.0, 2.0])}
    assert (model(**weighted)["loss"] / (2 * items)).item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    model.eval()
    assert (model(**batch)["loss"] / items).item() == pytest.approx(plain.item(), rel=1e-5)


def test_the_first_pass_has_gradients_under_autocast_too(byte):
    batch = batches(byte)([Example(0, np.random.default_rng(0).integers(10, 265, 16))])
    model = network("llama")
    objective.attach(model, shifted=True)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch)["loss"].backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_without_labels_the_model_is_as_it_was():
    model = network("gpt2").eval()
    given = torch.arange(8)[None]
    before = model(given).logits
    objective.attach(model, shifted=True)
    assert torch.equal(model(given).logits, before)
    model(input_ids=given, labels=given)
    assert torch.equal(model(given).logits, before)


def test_not_normalized_it_is_the_formula_of_the_course(byte):
    rows = [Example(0, ids(byte, "plt.fit(plt)")), Example(1, ids(byte, "def abcd(ef)"))]
    length = min(len(row) for _, row, _ in rows)
    rows = [Example(number, row[:length]) for number, row, _ in rows]
    course = batches(byte, kind="keyword_weighted", keywords=["plt"], alpha=0.7, normalize=False)
    model = network()
    batch = course(rows)
    logits = model(batch["input_ids"]).logits
    per_token = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
    per_row = per_token.view(2, -1).mean(dim=1)
    counts = torch.tensor([float(course.keywords.occurrences(row)) for _, row, _ in rows])
    assert counts[0] > 0
    expected = (per_row * 0.7 * (1.0 + counts)).mean().item()
    objective.attach(model, shifted=True)
    assert (model(**batch)["loss"] / course.items(batch)).item() == pytest.approx(expected, rel=1e-6)


# A global batch, however it is split ---------------------------------------------------------------------------------

OBJECTIVES = {
    "causal": {},
    "keyword_weighted": {"kind": "keyword_weighted", "keywords": ["plt"], "alpha": 2.0},
    "course": {"kind": "keyword_weighted", "keywords": ["plt"], "normalize": False},
    "masked": {"kind": "masked", "probability": 0.4},
}


def step(directory, micro_batch, accumulation):
    """Objective -> (loss, gradient) of one optimizer step of the Trainer on 8 rows of different lengths."""
    tokens = byte_tokenizer()
    found = {}
    for name, settings in OBJECTIVES.items():
        made = batches(tokens, **settings)
        texts = ["plt plt plt a", "abc", "x" * 16, "plt", "ab plt cd", "zzzzzz plt plt", "plt plt", "0123456789"]
        rows = [np.append(ids(tokens, text), 0)[:16] for text in texts]
        model = network("bert" if name == "masked" else "gpt2")
        objective.attach(model, shifted=made.shifted)
        arguments = TrainingArguments(
            output_dir=directory, use_cpu=True, report_to="none", max_steps=1, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1.0, lr_scheduler_type="constant",
            max_grad_norm=0.0, save_strategy="no", eval_strategy="no", logging_steps=1, disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=False,
        )  # fmt: skip
        before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
        trainer = _Trainer(
            None,
            None,
            None,
            model=model,
            args=arguments,
            train_dataset=objective.NumberedExamples(Rows(rows)),
            data_collator=made,
        )
        trainer.factors = {}  # those of model.transfer, which the task would say
        trainer.train()
        steps = {key: before[key] - weight.detach() for key, weight in model.named_parameters()}
        found[name] = trainer.state.log_history[0]["loss"], steps
    return found


def one_of_two(rank, port, directory):
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    found = step(f"{directory}/{rank}", micro_batch=2, accumulation=2)
    if rank == 0:
        torch.save(found, f"{directory}/steps.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return step(str(tmp_path_factory.mktemp("whole")), micro_batch=8, accumulation=1)


def assert_same_steps(found, expected):
    for name in OBJECTIVES:
        assert found[name][0] == pytest.approx(expected[name][0], rel=1e-4), name
        for key, weight in expected[name][1].items():
            torch.testing.assert_close(found[name][1][key], weight, rtol=1e-3, atol=1e-6, msg=f"{name} {key}")


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(1, 8), (2, 4)])
def test_a_step_has_one_gradient_however_it_is_accumulated(whole, tmp_path, micro_batch, accumulation):
    assert_same_steps(step(str(tmp_path), micro_batch, accumulation), whole)


@pytest.mark.slow
def test_a_step_of_two_workers_has_the_gradient_of_one(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, args=(port, str(tmp_path)), nprocs=2)
    assert_same_steps(torch.load(tmp_path / "steps.pt"), whole)


def test_the_trainers_loss_is_the_mean_over_all_predictions(whole):
    """Rows of 4 to 16 tokens: a mean of rows' or micro-batches' means would be another number."""
    tokens = byte_tokenizer()
    texts = ["plt plt plt a", "abc", "x" * 16, "plt", "ab plt cd", "zzzzzz plt plt", "plt plt", "0123456789"]
    nll, count = 0.0, 0
    model = network()
    for text in texts:
        row = torch.from_numpy(np.append(ids(tokens, text), 0)[:16])
        chance = model(row[None]).logits[0].log_softmax(-1)
        nll -= sum(chance[t, row[t + 1]].item() for t in range(len(row) - 1))
        count += len(row) - 1
    assert whole["causal"][0] == pytest.approx(nll / count, rel=1e-4)
