import hashlib
import pickle

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from raylm import generation
from raylm.checkpoint import TrainedModel
from raylm.config import CorpusConfig, TrainedTokenizer
from raylm.corpus import Document, File
from raylm.errors import ConfigError, DataError, StorageError
from raylm.generation.documents import _Worker
from raylm.generation.plan import Sections, _documents
from raylm.generation.text_generator import _Draw, _Row

CONTEXT = 24
LONG = "import os\n" * 9  # more tokens than the context
PROMPTS = ["def ", "import o", LONG, "", "<|endoftext|>", "é日", "def read(self):\n        "]


def made(tmp_path_factory, kind):
    """A directory with a model of random weights that are far apart, and a tokenizer of some source code."""
    from raylm import tokenizer

    directory = tmp_path_factory.mktemp("model")
    words = ("cat", "os", "reader")
    texts = [f"import {word}\n\ndef {word}(self, {word}s):\n    return self.{word}s\n" for word in words]
    trained = tokenizer.train(texts, TrainedTokenizer(vocab_size=320))
    trained.save_pretrained(directory)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(trained), "eos_token_id": 0, "bos_token_id": 0, "initializer_range": 0.5}
    if kind == "gpt2":
        network = GPT2LMHeadModel(GPT2Config(n_positions=CONTEXT, n_layer=1, n_head=2, n_embd=16, **sizes))
    else:
        layer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        network = LlamaForCausalLM(LlamaConfig(max_position_embeddings=CONTEXT, **layer, **sizes))
    network.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return made(tmp_path_factory, "gpt2")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return made(tmp_path_factory, "llama")


def text_generator(directory, seed=0, **given):
    settings = generation.resolve_settings(directory, {"max_new_tokens": 30, **given})
    return generation.load(str(directory), settings, seed, False, 1, None)


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"do_sample": False},
        {},
        {"top_k": 9, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"min_new_tokens": 12},
        {"stop_strings": ["s", "\n"]},
        {"num_beams": 2, "max_new_tokens": 26},
    ],
    ids=str,
)
def test_a_text_is_the_same_whatever_is_beside_it(directory, given):
    """More than the context is written, so that the windows slide: of each prompt at another place."""
    whole = text_generator(directory, **given)
    alone = [whole.texts([prompt])[0] for prompt in PROMPTS]
    assert whole.texts(PROMPTS) == alone
    assert whole.texts(PROMPTS[:2]) + whole.texts(PROMPTS[2:]) == alone
    assert all(text.startswith(prompt) for prompt, (text, _) in zip(PROMPTS, alone, strict=True))
    assert len({text for text, _ in alone}) == len(PROMPTS)


def test_padding_is_not_read_by_a_model_without_a_table_of_positions(llama):
    whole = text_generator(llama, do_sample=False)
    assert whole.texts(PROMPTS) == [whole.texts([prompt])[0] for prompt in PROMPTS]


def test_within_the_context_the_likeliest_tokens_are_those_of_transformers(directory):
    whole = text_generator(directory, do_sample=False, max_new_tokens=12)
    prompt = "import o"
    given = torch.tensor([[0, *whole.tokenizer(prompt)["input_ids"]]])  # behind the prefix
    mask = torch.ones_like(given)  # or they take the prefix for padding
    theirs = whole.network.generate(given, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert whole.texts([prompt]) == [(whole.tokenizer.decode(theirs[0], skip_special_tokens=True), 12)]


def test_the_seed_and_the_prompt_draw_the_text(directory):
    first, again, other = text_generator(directory), text_generator(directory), text_generator(directory, seed=1)
    torch.manual_seed(5)
    text = first.texts(["def "])
    torch.manual_seed(6)
    assert again.texts(["x", "def "])[1:] == text
    assert other.texts(["def "]) != text


def test_tokens_are_drawn_from_what_transformers_leaves_of_the_scores(directory):
    """Temperature first, then the four likeliest tokens, then those of them with 0.9 of the probability."""
    whole = text_generator(directory, max_new_tokens=1, temperature=0.5, top_k=4, top_p=0.9)
    given = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    seen = []
    whole.network.generate(
        **given,
        generation_config=whole.settings,
        custom_generate=lambda model, input_ids, logits_processor, **_: seen.append(logits_processor),
    )
    with torch.inference_mode():
        scores = whole.network(given["input_ids"]).logits[:, -1]
        chances = seen[0](given["input_ids"], scores.clone()).softmax(-1)[0]
    rows = [_Row(whole, "") for _ in range(2000)]
    for seed, row in enumerate(rows):
        row.random.manual_seed(seed)
    whole._extend(rows, None)
    drawn = torch.zeros(len(chances))
    for row in rows:
        drawn[row.generated[0] if row.generated else 0] += 1 / len(rows)
    assert 1 < (chances > 0).sum() <= 4
    assert (drawn - chances).abs().sum() < 0.1
    assert drawn[chances == 0].sum() == 0


def test_each_row_is_drawn_with_a_random_generator_of_its_own():
    scores = torch.zeros(2, 1000)
    draw = _Draw([torch.Generator().manual_seed(seed) for seed in (1, 2)])
    alone = _Draw([torch.Generator().manual_seed(2)])
    both = [draw(None, scores).argmax(-1).tolist() for _ in range(5)]
    assert [second for _, second in both] == [alone(None, scores[1:]).argmax().item() for _ in range(5)]


def test_a_longer_text_extends_the_shorter_one(directory):
    short, long = text_generator(directory, max_new_tokens=10), text_generator(directory, max_new_tokens=60)
    assert long.texts(["def "])[0].text.startswith(short.texts(["def "])[0].text)


def test_beyond_the_context_the_end_of_the_text_is_read(directory):
    whole = text_generator(directory, max_new_tokens=99)
    row = _Row(whole, "@" * (CONTEXT - 2))
    assert len(row.window()) == CONTEXT - 1  # with the prefix
    row.extend([5], 1)
    assert row.window() == [*row.read, 5][-CONTEXT // 2 :]
    row.extend([6], 1)
    assert row.window() == [*row.read, 5, 6][-CONTEXT // 2 - 1 :]
    assert len(_Row(whole, "@" * 99).window()) == CONTEXT // 2
    short = text_generator(directory, max_new_tokens=8)
    assert len(_Row(short, "@" * 99).window()) == CONTEXT - 8  # there is room for the 8 that are to come


def test_a_text_ends_at_its_stop_string(directory):
    for text, tokens in text_generator(directory, stop_strings="e").texts(["x", "def ", "ee"]):
        added = text.split("def ")[-1] if text.startswith("def ") else text[len("ee" if text[0] == "e" else "x") :]
        assert ("e" in added and "e" not in added[: -len(added.split("e", 1)[1]) - 1]) or tokens == 30


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
def test_what_is_shown_while_it_is_made_is_the_text(kind):
    from raylm import tokenizer

    texts = ["the cat sat on the mats. the cats saw ten dogs, é日😀 run"] * 3
    trained = tokenizer.train(texts, TrainedTokenizer(kind=kind, vocab_size=300))
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(trained), n_positions=CONTEXT, n_layer=1, n_head=1, n_embd=8))
    settings = GenerationConfig(do_sample=True, max_new_tokens=40, min_new_tokens=40, eos_token_id=[0])
    whole = generation.TextGenerator(TrainedModel(network.eval(), trained, None, {}), settings, seed=0)
    for prompt in ("the cat", "the ", "é日😀"):
        pieces: list[str] = []
        [(text, _)] = whole.texts([prompt], pieces.append)
        assert "".join(pieces) == text
        assert text.startswith(prompt)
        assert len(pieces) > 10


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("prompt", ["the ", "the"])
def test_a_space_at_the_end_of_a_prompt_is_that_of_the_next_word(kind, prompt):
    from raylm import tokenizer

    trained = tokenizer.train(["the cat sat on the mats. the cats saw ten dogs"] * 3, TrainedTokenizer(kind=kind))
    network = GPT2LMHeadModel(GPT2Config(vocab_size=len(trained), n_positions=CONTEXT, n_layer=1, n_head=1, n_embd=8))
    settings = GenerationConfig(max_new_tokens=1, eos_token_id=[0])
    row = _Row(generation.TextGenerator(TrainedModel(network, trained, None, {}), settings, seed=0), prompt)
    ids = trained("the cat", add_special_tokens=False)["input_ids"]
    assert row.read[-len(row.read) + 1 :] == ids[: len(row.read) - 1]
    assert row.text(ids[len(row.read) - 1 :]) == "the cat"
    assert row.text() == prompt


def test_masks_are_filled_in_windows_of_the_context(tmp_path):
    from raylm import tokenizer

    trained = tokenizer.train(["a b c d"], TrainedTokenizer(vocab_size=260, special_tokens=["<eos>", "<mask>"]))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "hidden_size": 8, "intermediate_size": 8}
    torch.manual_seed(0)
    network = BertForMaskedLM(BertConfig(vocab_size=len(trained), max_position_embeddings=8, **sizes)).eval()
    network.config.architectures = ["BertForMaskedLM"]
    whole = generation.TextGenerator(TrainedModel(network, trained, None, {}), GenerationConfig(), seed=0)
    [first, none, long] = whole.texts(["a<mask>c", "a b", "a b c d a b c<mask>"])

    def likeliest(ids):
        with torch.inference_mode():
            logits = network(torch.tensor([[0, *ids, 0]])).logits[0]
        return trained.decode([logits[1 + ids.index(trained.mask_token_id)].argmax()])

    assert first == (f"a{likeliest(trained('a<mask>c')['input_ids'])}c", 1)
    assert none == ("a b", 0)
    ids = trained("a b c d a b c<mask>")["input_ids"]
    assert long == ("a b c d a b c" + likeliest(ids[(len(ids) - 1) // 6 * 6 :]), 1)  # 8 positions, 6 between the ends


# Settings ------------------------------------------------------------------------------------------------------------


def test_given_settings_override_those_of_the_model_which_override_the_defaults(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    GenerationConfig(do_sample=True, temperature=0.3, top_k=7, eos_token_id=[0, 5]).save_pretrained(tmp_path)
    settings = generation.resolve_settings(tmp_path, {"top_k": 4, "top_p": None})
    expected = {"max_new_tokens": 100, "do_sample": True, "top_p": 0.95, "top_k": 4, "temperature": 0.3}
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.eos_token_id == [0, 5]
    assert generation.resolve_settings(tmp_path, {"do_sample": False}).do_sample is False
    assert generation.resolve_settings(directory, {"num_beams": 2}).do_sample is False
    assert generation.resolve_settings(directory, {"temperature": 2}).temperature == 2.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_q": 1}, r"top_q: not a field of transformers.GenerationConfig; did you mean top_p\?"),
        ({"max_length": 9}, r"max_length: is not taken; did you mean max_new_tokens\?"),
        ({"temperature": 0}, "temperature=0: .*strictly positive float.*do_sample=False"),
        ({"do_sample": False, "top_k": 3}, "top_k=3: do_sample is not set to True"),
        ({"num_beams": 3, "top_p": 0.5}, "top_p=0.5: do_sample is not set to True"),
        ({"top_k": "many"}, "top_k must be a whole number of at least 0, got many"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"max_new_tokens": 2.5}, "max_new_tokens must be a whole number of at least 1, got 2.5"),
        ({"num_beams": 2, "do_sample": True}, "num_beams excludes do_sample=true"),
        ({"stop_strings": 3}, "stop_strings must be a text or a list of texts, got 3"),
        ({"bad_words_ids": [[999999]]}, "bad_words_ids="),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_as_it_was_typed(directory, given, message):
    with pytest.raises(ConfigError, match=message) as error:
        generation.resolve_settings(directory, given)
    assert error.value.where in given


def test_a_tokenizer_without_an_end_cannot_end_a_text(directory, tmp_path):
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = (directory / "tokenizer_config.json").read_text()
    (tmp_path / "tokenizer_config.json").write_text(config.replace('"eos_token"', '"not_eos_token"'))
    with pytest.raises(DataError, match="names no end-of-text token"):
        generation.resolve_settings(tmp_path, {})


# A worker ------------------------------------------------------------------------------------------------------------


def hash_of(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def test_a_worker_answers_in_the_order_of_its_batch_and_hands_on_what_the_user_can_mend(directory):
    batch = [
        Document(text, len(text), hash_of(text), source, "train", File("a.txt", 0, ""))
        for source, text in enumerate(["def ", "x"])
    ]
    row = {"batch": pickle.dumps(batch)}
    answers = pickle.loads(_Worker(lambda: text_generator(directory))(row)["texts"])
    assert [(answer.prompt, answer.source, answer.hash) for answer in answers] == [
        ("def ", 0, hash_of("def ")),
        ("x", 1, hash_of("x")),
    ]
    assert [answer.text for answer in answers] == [text for text, _ in text_generator(directory).texts(["def ", "x"])]
    worker = _Worker(lambda: generation.load("/nowhere", None, 0, False, 1, None))
    gone = pickle.loads(worker(row)["texts"])
    assert isinstance(gone, StorageError)


@pytest.mark.parametrize(("deduplicate", "number"), [(False, 3), ("exact", 3), ("near", 2)])
def test_of_near_duplicates_the_first_is_continued(tmp_path, deduplicate, number):
    text = " ".join(f"word{index}" for index in range(200))
    for name, content in {"a": text, "b": "something else", "c": f"{text} more"}.items():
        (tmp_path / f"{name}.txt").write_text(content)
    corpus = CorpusConfig(paths=f"{tmp_path}/*.txt", deduplicate=deduplicate, validation_fraction=0)
    assert _documents(tmp_path / "out.jsonl", Sections(corpus=corpus), mask="").number == number
