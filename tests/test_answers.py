"""Documents of which a part alone, the answers, is learned and scored."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from tokenizers import decoders as decoding
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from raylm import api, blocks, config, corpus, examples, objective, perplexity, tokens
from raylm import plan as plans
from raylm import tokenizer as tokenizers
from raylm.blocks import IGNORED
from raylm.config import BlocksConfig, CorpusConfig, ObjectiveConfig, TokenizerConfig
from raylm.errors import ConfigError, DataError
from raylm.tokenizer import Conversations, Frame, Refused, Unanswered

# Chat templates, written after those of the models, without what no test needs.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ message.content | trim + '<end_of_turn>\n' }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message.role == 'user' %}"
    "{{ bos_token + '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TWICE = "{% for message in messages %}{{ message.role + ': ' + message.content + message.content }}{% endfor %}"


def bytes_tokenizer(template=None, special=(), bos=None, eos="<|end|>", adds_begin=False):
    """A tokenizer whose tokens are the bytes of UTF-8, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoding.ByteLevel()
    names = [*dict.fromkeys([*special, *([bos] if bos else []), eos])]
    backend.add_special_tokens([AddedToken(name, special=True) for name in names])
    if adds_begin:
        around = {"single": [bos, "$A"], "special_tokens": [(bos, backend.token_to_id(bos))]}
        backend.post_processor = TemplateProcessing(**around)
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
    made.chat_template = template
    return made


FAMILIES = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    "Llama 3": (LLAMA, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|begin|>", "<|end|>", True),
    "Gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>", True),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]"], "<s>", "</s>", True),
    "Llama 2": (LLAMA_2, [], "<s>", "</s>", True),
    "SmolLM2": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|im_start|>", "<|im_end|>"),
    "marked": (MARKED, ["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
}
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, naïve one"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye"},
]


def conversations(family):
    return Conversations(bytes_tokenizer(*FAMILIES[family]), "here")


# Conversations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "first", "last"),
    [
        ("ChatML", "Hello, naïve one<|im_end|>", "Bye"),  # the token at the end is put there by raylm
        ("Llama 3", "Hello, naïve one<|eot_id|>", "Bye<|eot_id|>"),
        ("Gemma", "Hello, naïve one<end_of_turn>", "Bye<end_of_turn>"),
        ("Mistral", " Hello, naïve one</s>", " Bye"),
        ("Llama 2", " Hello, naïve one </s>", " Bye "),
        ("SmolLM2", "Hello, naïve one<|im_end|>", "Bye"),
        ("marked", "Hello, naïve one<|im_end|>", "Bye"),
    ],
)
def test_the_answers_of_a_conversation_are_found_in_the_text_of_its_template(family, first, last):
    text, spans, num_bytes = conversations(family).text(json.dumps(CHAT))
    found = [text[a:b] for a, b in spans]
    assert [part.lstrip() for part in found] == [first.lstrip(), last.lstrip()]
    said = len("Hello, naïve oneBye".encode())
    assert said <= num_bytes <= said + first.count(" ") + last.count(" "), "with spaces, without special tokens"
    tokenizer = bytes_tokenizer(*FAMILIES[family])
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text in whole
    assert whole.replace(text, "").strip() in ("", "<|begin|>", "<bos>", "<s></s>", "<|im_end|>"), (
        "only the frame is gone"
    )
    assert text.startswith("<|im_start|>user") == ("<|im_start|>" in whole)


def test_a_conversation_that_ends_with_a_question_has_no_answer_at_its_end():
    text, spans, _ = conversations("ChatML").text(json.dumps(CHAT[:3]))
    assert [text[a:b] for a, b in spans] == ["Hello, naïve one<|im_end|>"]
    assert text.endswith("Bye")


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (CHAT[:1], "without an assistant turn"),
        ([CHAT[0], {"role": "assistant", "content": " \n"}], "empty completion"),
        ([{"role": "user", "content": "what is <|im_end|>?"}, CHAT[1]], "a message spells a special token"),
    ],
)
def test_a_conversation_of_which_nothing_can_be_learned_is_told_by_its_reason(messages, why):
    with pytest.raises(Unanswered, match=f"^{why}$"):
        conversations("ChatML").text(json.dumps(messages))


def test_a_template_is_refused_by_name_if_its_answers_cannot_be_told():
    twice = Conversations(bytes_tokenizer(TWICE), "here")
    with pytest.raises(ConfigError, match=r"corpus\.messages: where the tokenizer's chat template puts the answers"):
        twice.text(json.dumps(CHAT))
    called = [CHAT[0], {"role": "assistant", "content": "so", "tool_calls": [], "weight": 1}]
    with pytest.raises(Refused, match=r'begins with "Hi": it writes tool_calls of an answer, too, and does not mark'):
        Conversations(bytes_tokenizer(CHATML + "{% if messages[0].tool_calls %}{% endif %}"), "here").text(
            json.dumps(called)
        )
    assert conversations("ChatML").text(json.dumps(called)).answers, "the template does not look at the other fields"
    with pytest.raises(Refused, match='cannot write the conversation that begins with "Hi": roles must alternate'):
        conversations("Gemma").text(json.dumps([CHAT[0], CHAT[0], CHAT[1]]))
    with pytest.raises(ConfigError, match=r"corpus\.messages needs a tokenizer with a chat template"):
        Conversations(bytes_tokenizer(), "here")


def test_the_text_of_a_conversation_does_not_depend_on_the_day():
    dated = Conversations(bytes_tokenizer("{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' }}" + CHATML), "here")
    assert dated.text(json.dumps(CHAT)).text.startswith("Today is 26 Jul 2024. <|im_start|>user")


def test_a_tokenizer_with_several_templates_and_no_default_says_so():
    several = bytes_tokenizer({"tool_use": CHATML, "rag": CHATML})
    with pytest.raises(ConfigError, match="no default specified"):
        Conversations(several, "here")


# Rows ----------------------------------------------------------------------------------------------------------------

ROWS = [
    {"question": "Where?", "answer": "There"},
    {"question": "Who, naïve one?", "answer": "Me, naïve"},
    {"question": "What?", "answer": " \n"},
]


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def read(section):
    ledger = corpus.Ledger()
    (shard,) = corpus.shards(corpus.list_sources(section))
    return list(corpus.documents(shard, section, ledger)), ledger


def test_a_prompt_stands_before_the_answer_and_a_space_between_them_is_of_the_answer(rows):
    found, ledger = read(CorpusConfig(paths=str(rows), prompt="Q: {question}\nA: ", text="answer"))
    assert [document.text for document in found] == ["Q: Where?\nA: There", "Q: Who, naïve one?\nA: Me, naïve"]
    assert [document.prompt for document in found] == ["Q: Where?\nA:", "Q: Who, naïve one?\nA:"]
    assert [document.num_bytes for document in found] == [len(b" There"), len(" Me, naïve".encode())]
    assert ledger["empty completion"] == 1
    assert ledger["kept"] == 2
    plain, _ = read(CorpusConfig(paths=str(rows), text="Q: {question}\nA: {answer}", max_documents=None))
    assert plain[0].text == found[0].text
    assert plain[0].hash != found[0].hash, "another document is scored"
    assert plain[0].split == found[0].split


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        ({"prompt": "{quest}", "text": "answer"}, "corpus.prompt", "corpus.prompt: no column 'quest'; .*question"),
        ({"prompt": "question", "text": "text"}, "corpus.text", "corpus.text: no column 'text'"),
        ({"messages": "answer"}, None, r"corpus.messages: column 'answer' must hold a list of messages \{role: user"),
    ],
)
def test_a_column_that_is_missing_or_wrong_is_told_with_its_setting(rows, settings, where, message):
    with pytest.raises(DataError, match=message) as error:
        read(CorpusConfig(paths=str(rows), **settings))
    assert error.value.where == (where or str(rows))


def test_messages_are_read_as_data_sets_have_them(tmp_path):
    shared = [{"from": "human", "value": "Hi", "weight": None}, {"from": "gpt", "value": "Hello", "weight": 1}]
    file = tmp_path / "chats.jsonl"
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    rows = [CHAT[:2], shared, json.dumps(CHAT[:2]), parts, [], [{"role": "user"}], ["Hi"]]
    file.write_text("".join(json.dumps({"a": {"chat": row}}) + "\n" for row in rows))
    found, ledger = read(CorpusConfig(paths=str(file), messages="a.chat", on_bad_row="skip"))
    assert [json.loads(document.text) for document in found] == [
        CHAT[:2],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}],
        CHAT[:2],
        CHAT[:1],
    ]
    assert ledger["bad rows"] == 3


def test_plain_text_has_no_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"plain text, but corpus\.prompt needs columns"):
        read(CorpusConfig(paths=str(tmp_path / "a.txt"), prompt="question"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["corpus.prompt=a", "corpus.messages=b"], "corpus.prompt: cannot be given with corpus.messages"),
        (
            ["corpus.messages=b", "corpus.tokens=c"],
            "corpus.messages: cannot be given with corpus.tokens",
        ),
        (["corpus.prompt=a", "corpus.split_by=passage"], "corpus.split_by: must be document with corpus.prompt"),
        (["corpus.prompt=a", "objective.kind=masked"], "objective.kind: must be causal or keyword_weighted"),
        (
            ["corpus.messages=b", "corpus.keep_any=[]", "corpus.max_chars=null"],
            "corpus.messages: must come with tokenizer",
        ),
        (
            ["corpus.messages=b", "corpus.keep_any=[a]"],
            "corpus.keep_any: is for text and cannot be given with corpus.mess",
        ),
    ],
)
def test_settings_that_do_not_go_with_answers_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        config.load(None, given)


def test_an_evaluation_set_without_the_columns_is_scored_whole(rows, tmp_path):
    general = tmp_path / "general"
    general.mkdir()
    (general / "a.txt").write_text("plain text")
    (general / "settings.json").write_text('{"a": 1}')
    (tmp_path / "general.jsonl").write_text('{"text": "a row"}\n')
    like = CorpusConfig(paths="x", prompt="{question}", text="answer")
    assert plans.evaluation_set([str(rows)], like, "eval.paths").corpus.prompt == "{question}"
    plain = CorpusConfig(paths="x", messages="messages")
    for paths, text in (([str(general)], "plain text"), ([str(tmp_path / "general.jsonl")], "a row")):
        found = plans.evaluation_set(paths, plain, "eval.paths").corpus
        assert found.messages is None
        assert [document.text for document in read(found)[0]] == [text]


def test_tables_without_the_column_of_messages_are_not_passed_over_for_a_readme(tmp_path):
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    with pytest.raises(DataError, match="corpus.messages: no column 'mesages'; .*did you mean messages"):
        corpus.list_sources(CorpusConfig(paths=str(tmp_path), messages="mesages"))


# Tokens --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    def save(*how):
        directory = tmp_path_factory.mktemp("tokenizer")
        bytes_tokenizer(*how).save_pretrained(directory)
        return str(directory)

    return save


def prepared(section, tokenizer, storage):
    sources = corpus.list_sources(section)
    return tokens.prepare(section, TokenizerConfig(path=tokenizer), storage=str(storage), sources=sources)[0]


@pytest.mark.usefixtures("ray_cluster")
def test_a_store_keeps_which_tokens_are_of_answers(rows, saved, tmp_path):
    section = CorpusConfig(paths=str(rows), prompt="Q: {question}\nA: ", text="answer", validation_fraction=0)
    store = prepared(section, saved(), tmp_path / "runs")
    assert [store.train.answers(0).sum(), store.train.answers(1).sum()] == [6, 11], "ï is two bytes, so two tokens"
    for index, answer in enumerate([" There", " Me, naïve"]):
        own = store.train[index][store.train.answers(index)]
        assert store.tokenizer.decode(own) == answer
        assert store.train.document_bytes(index) == len(answer.encode())
    size = sum(len(f"Q: {row['question']}\nA: {row['answer']}".encode()) for row in ROWS[:2])
    assert store.counts("train") == {
        "documents": 2, "tokens": size, "bytes": 17, "unknown_tokens": 0, "answer_tokens": 17,
    }  # fmt: skip
    assert store.train.scored_tokens(1) == 6
    encoded = tokens.encode_files(section, corpus.list_sources(section), saved())
    assert [encoded.answers(index).tolist() for index in range(2)] == [
        store.train.answers(index).tolist() for index in range(2)
    ]
    whole = prepared(
        CorpusConfig(paths=str(rows), text="Q: {question}\nA: {answer}", validation_fraction=0),
        saved(),
        tmp_path / "runs",
    )
    assert whole.train.answers(0) is None
    assert np.array_equal(whole.train[0], store.train[0])
    assert len(whole.train) == 3, "the third row has no answer"


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_has_the_ids_of_its_template_without_a_second_begin_of_text(family, saved, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n" + json.dumps({"messages": CHAT[:1]}) + "\n")
    section = CorpusConfig(paths=str(file), messages="messages", validation_fraction=0)
    store = prepared(section, saved(*FAMILIES[family]), tmp_path / "runs")
    assert store.manifest["ledger"]["without an assistant turn"] == 1
    assert "corpus: 1 document left out: without an assistant turn" in tokens.warnings(store)
    assert len(store.train) == 1
    frame = store.frame("auto")
    assert (frame.prefix == store.tokenizer.bos_token_id) == (FAMILIES[family][4:] == (True,))
    own = store.tokenizer.apply_chat_template(CHAT, return_dict=False)
    ours = store.train[0].tolist()
    begin = FAMILIES[family][4:] == (True,)
    assert own[begin : begin + len(ours)] == ours
    (newline,) = store.tokenizer("\n", add_special_tokens=False)["input_ids"]
    rest = [id for id in own[begin + len(ours) :] if id != newline]
    assert rest in ([], [frame.end])
    said = store.tokenizer.decode(store.train[0][store.train.answers(0)], skip_special_tokens=True)
    assert said.replace(" ", "") == "Hello,naïveoneBye"


@pytest.mark.usefixtures("ray_cluster")
def test_stores_of_two_chat_templates_share_no_shards_and_name_the_same_documents(saved, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CHAT}) + "\n")
    section = CorpusConfig(paths=str(file), messages="messages", validation_fraction=0)
    stores = [prepared(section, saved(*FAMILIES[family]), tmp_path / "runs") for family in ("ChatML", "Gemma")]
    other = saved(CHATML.replace("message.role", "message.role + '!'"), *FAMILIES["ChatML"][1:])
    stores.append(prepared(section, other, tmp_path / "runs"))
    assert len({store.path for store in stores}) == 3
    assert len({store.train[0].tobytes() for store in stores}) == 3
    assert len({store.train.document_id(0) for store in stores}) == 1
    assert {store.train.document_bytes(0) for store in stores} == {len("Hello, naïve oneBye".encode())}


def test_a_tokenizer_that_does_not_tell_characters_is_refused(tmp_path):
    from transformers import CTRLTokenizer

    (tmp_path / "vocab.json").write_text('{"a</w>": 0, "<unk>": 1, "b</w>": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    made = CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), eos_token="<unk>")
    made.save_pretrained(tmp_path / "made")
    with pytest.raises(DataError, match="its tokenizer is written in Python"):
        tokenizers.answer_encoder(str(tmp_path / "made"), with_conversations=False)


def test_what_a_vocabulary_cannot_spell_is_an_error_with_prompts_too(tmp_path):
    backend = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="<none>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(tmp_path)
    encode = tokenizers.answer_encoder(str(tmp_path), with_conversations=False)
    assert encode(["a a"], [[(1, 3)]])[2].tolist() == [0, 1]
    with pytest.raises(DataError, match="its vocabulary cannot spell the document that starts with 'a b'"):
        encode(["a", "a b"], [[], []])


# Blocks --------------------------------------------------------------------------------------------------------------


class Documents:
    """What blocks ask of a Split with prompts, over shards of documents, each a list of (id, is of an answer)."""

    has_prompts = True

    def __init__(self, *shards):
        self._shards = shards
        self.shards = [(len(shard), sum(map(len, shard))) for shard in shards]
        self.num_tokens = sum(size for _, size in self.shards)

    def __len__(self):
        return sum(map(len, self._shards))

    def _arrays(self, shard, which, kind):
        documents = self._shards[shard]
        offsets = np.cumsum([0, *map(len, documents)]).astype(np.int32)
        return np.array([pair[which] for document in documents for pair in document], kind), offsets

    def arrays(self, shard):
        return self._arrays(shard, 0, np.uint16)

    def answer_arrays(self, shard):
        return self._arrays(shard, 1, np.uint8)

    def lengths(self):
        return (np.diff(self.arrays(shard)[1]) for shard in range(len(self._shards)))

    def _document(self, index):
        return [document for shard in self._shards for document in shard][index]

    def __getitem__(self, index):
        return np.array([id for id, _ in self._document(index)], np.uint16)

    def answers(self, index):
        return np.array([bool(mark) for _, mark in self._document(index)])


DOCUMENTS = st.lists(
    st.lists(
        st.lists(st.tuples(st.integers(5, 99), st.integers(0, 1)), min_size=1, max_size=12), min_size=1, max_size=5
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(
    DOCUMENTS,
    st.sampled_from([Frame(0, 0), Frame(None, 0), Frame(100, 0)]),
    st.sampled_from(["packed", "chunked", "padded"]),
    st.integers(2, 9),
    st.booleans(),
)
def test_labels_are_those_of_all_tokens_where_they_are_of_an_answer(shards, frame, packing, size, isolated):
    """By a stream of (id, is of an answer) that is joined and cut by hand."""
    section = BlocksConfig(block_size=size, packing=packing, isolate_documents=isolated and packing == "packed")
    made = blocks.build(Documents(*shards), section, frame)
    framed = []
    for document in (document for shard in shards for document in shard):
        end = [(frame.end, document[-1][1])]
        framed.append([*([] if frame.prefix is None else [(frame.prefix, 0)]), *document, *end])
    if packing == "padded":
        cut = [document[:size] for document in framed]
    elif packing == "chunked":
        cut = [document[at : at + size] for document in framed for at in range(0, len(document) - size + 1, size)]
    else:
        joined = [
            pair for document in framed for pair in (document if frame.in_stream == 2 else document[-len(document) :])
        ]
        if frame.prefix == frame.end:  # the end of one is the prefix of the next
            joined = [pair for document in framed for pair in document[1:]]
        cut = [joined[at : at + size] for at in range(0, len(joined) - size + 1, size)]
    assert len(made) == len(cut)
    if not cut:
        return
    rows, marks = made.rows(range(len(cut))), made.marks(range(len(cut)))
    assert [row.tolist() for row in rows] == [[id for id, _ in row] for row in cut]
    assert [(row & blocks.ANSWER).tolist() for row in marks] == [[mark for _, mark in row] for row in cut]
    every, some = blocks.batch(rows, section, frame), blocks.batch(rows, section, frame, marks)
    for name in every.keys() - {"labels"}:
        assert np.array_equal(every[name], some[name])
    for number, mark in enumerate(marks):
        expected = np.where(mark & blocks.ANSWER, every["labels"][number, : len(mark)], IGNORED)
        assert some["labels"][number, : len(mark)].tolist() == expected.tolist()


@pytest.mark.usefixtures("ray_cluster")
def test_the_sources_of_a_mixture_keep_their_answers(tmp_path, saved):
    for name in ("a", "b"):
        lines = ({"question": f"{name} {number}?", "answer": str(number) * 3} for number in range(60))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = {name: (str(tmp_path / f"{name}.jsonl"),) for name in ("a", "b")}
    section = CorpusConfig(paths=paths, prompt="{question}", text="answer", validation_fraction=0)
    store = prepared(section, saved(), tmp_path / "runs")
    cut = BlocksConfig(block_size=32, packing="padded", mixture={"a": 2, "b": 1})
    mixed = examples.build(store.train, cut, store.frame("auto"), seed=0, length=30)
    numbered = objective.NumberedExamples(mixed)
    found = numbered.__getitems__(range(30))
    told = [store.tokenizer.decode(example.ids[example.marks == blocks.ANSWER]) for example in found]
    asked = [store.tokenizer.decode(example.ids[example.marks == 0][1:]) for example in found]
    assert all(answer == question[2:-1] * 3 for question, answer in zip(asked, told, strict=True))
    assert sum(question.startswith("a") for question in asked) == 20


@pytest.mark.usefixtures("ray_cluster")
def test_prompts_that_are_longer_than_a_block_are_counted(rows, saved, tmp_path):
    section = CorpusConfig(paths=str(rows), prompt="Q: {question}\nA:", text="answer", validation_fraction=0)
    store = prepared(section, saved(), tmp_path / "runs")
    frame = store.frame("auto")
    longest = len("Q: Who, naïve one?\nA:".encode()) + 1
    for size, late in ((13, 2), (14, 1), (longest, 1), (longest + 1, 0)):
        for packing, what in (("padded", "are not learned"), ("packed", "learned without the beginning")):
            found = list(blocks.warnings(store.train, BlocksConfig(block_size=size, packing=packing), frame))
            assert [f"blocks.block_size: {late} of 2 " in each and what in each for each in found] == [True] * (
                late > 0
            )


# The loss and the score ----------------------------------------------------------------------------------------------


def small_model(vocab_size):
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ).eval()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("context", [64, 12])
def test_the_perplexity_of_answers_is_that_of_their_tokens_alone(rows, saved, tmp_path, context):
    """Against each answer by itself: the model reads prompt and answer in one piece, and transformers' own loss counts
    the tokens of the answer. In windows that are shorter than a document only the sum over all is compared."""
    section = CorpusConfig(paths=str(rows), prompt="Q: {question}\nA: ", text="answer", validation_fraction=0)
    store = prepared(section, saved(), tmp_path / "runs")
    frame, model = store.frame("auto"), small_model(store.vocab_size)
    score = perplexity.score(model, store.train, frame=frame, context=context, stride=1)
    nll, count, size = 0.0, 0, 0
    for row in ROWS[:2]:
        prompt = [frame.prefix, *store.tokenizer(f"Q: {row['question']}\nA:")["input_ids"]]
        answer = store.tokenizer(f" {row['answer']}")["input_ids"]
        for number, token in enumerate(answer):
            read = [*prompt, *answer[:number]][-context:]
            logits = model(torch.tensor([read])).logits[0, -1]
            nll += F.cross_entropy(logits, torch.tensor(token)).item()
        count, size = count + len(answer), size + len(f" {row['answer']}".encode())
    assert (score.tokens, score.bytes) == (count, size)
    assert score.nll == pytest.approx(nll, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nll / count), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_the_loss_counts_answers_and_the_end_of_text_behind_them_alone(rows, saved, tmp_path):
    section = CorpusConfig(paths=str(rows), prompt="Q: {question}\nA: ", text="answer", validation_fraction=0)
    store = prepared(section, saved(), tmp_path / "runs")
    cut, frame = BlocksConfig(block_size=64, packing="padded"), store.frame("auto")
    numbered = objective.NumberedExamples(examples.build(store.train, cut, frame, seed=0, length=2))
    collator = objective.build(ObjectiveConfig(), cut, store.tokenizer, frame, 0)
    batch = collator(numbered.__getitems__([0, 1]))
    assert collator.items(batch) == 6 + 1 + 11 + 1
    learned = sorted(store.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"])
    assert learned == [" Me, naïve<|end|>", " There<|end|>"]
    model = small_model(store.vocab_size)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    objective.attach(model, shifted=True)
    assert model(**batch)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_documents_are_isolated_at_their_ends_and_not_at_the_ends_of_turns():
    """A turn of ChatML ends with the token that ends a document."""
    turns = [[(7, 0), (0, 0), (8, 1), (9, 1)], [(5, 0), (0, 0), (6, 1)]]
    begun = [[(1, 0), *turns[0], (1, 0), (4, 1)]]  # Llama 2's template begins every turn with the prefix
    section = BlocksConfig(block_size=9, isolate_documents=True)
    made = blocks.build(Documents([begun[0], turns[1]]), section, Frame(1, 3))
    batch = blocks.batch(made.rows([0]), section, Frame(1, 3), made.marks([0]))
    assert batch["input_ids"].tolist() == [[1, 1, 7, 0, 8, 9, 1, 4, 3]]
    assert batch["position_ids"].tolist() == [[*range(9)]]
    for frame in (Frame(0, 0), Frame(None, 0)):
        section = BlocksConfig(block_size=9, isolate_documents=True)
        made = blocks.build(Documents(turns), section, frame)
        batch = blocks.batch(made.rows([0]), section, frame, made.marks([0]))
        assert batch["input_ids"].tolist() == [[7, 0, 8, 9, 0, 5, 0, 6, 0]]
        expected = [0, 1, 2, 3, 0, 1, 2, 3, 0] if frame.prefix == 0 else [0, 1, 2, 3, 4, 0, 1, 2, 3]
        assert batch["position_ids"].tolist() == [expected]
        assert batch["labels"].tolist() == [[IGNORED, IGNORED, 8, 9, 0, IGNORED, IGNORED, 6, 0]]


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_a_training_on_answers_is_scored_on_answers(ray_cluster, kind, saved, tmp_path):
    """From rows to the score of the export, which another command computes again; general text is scored whole."""
    chats = (
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n % 7}."}] for n in range(400)
    )
    lines = ({"question": chat[0]["content"], "answer": chat[1]["content"], "messages": chat} for chat in chats)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "general.txt").write_text("all of this is scored\n" * 5)
    own = {"prompt": {"prompt": "{question}\n", "text": "answer"}, "messages": {"messages": "messages"}}
    experiment = api.load(
        {
            "storage": f"{tmp_path}/runs",
            "corpus": {"paths": f"{tmp_path}/rows.jsonl", **own[kind]},
            "tokenizer": {"path": saved(*FAMILIES["ChatML"])},
            "model": {"config": {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 64}},
            "blocks": {"block_size": 64, "isolate_documents": True},
            "train": {"max_tokens": 20_480, "batch_tokens": 512, "learning_rate": 1e-2},
            "eval": {"paths": {"general": f"{tmp_path}/general.txt"}},
            "tracking": {"uri": None},
        }
    )
    result = api.train(experiment)
    # Of an answer only the number is news.
    assert result.untrained_score > 100
    assert result.score < 2
    store = api.open_store(api.prepare(experiment).path)
    assert result.prefix == (None if kind == "messages" else "<|im_end|>")
    for prefix in (experiment.tokenizer.prefix, "auto"):
        score = api.evaluate(result.checkpoint, **{"eval.paths": [], "tokenizer.prefix": prefix})
        assert score.perplexity == pytest.approx(result.score, rel=1e-6)
    assert score.score.tokens == store.validation.answer_tokens == len(store.validation) * len("It is 1.")
    general = api.evaluate(result.checkpoint)
    unscored = 1 if kind == "messages" else 0  # without a prefix nothing predicts the first token
    assert general.score.tokens == 5 * len("all of this is scored\n") - unscored


def test_generation_continues_the_prompts(rows):
    from raylm.generation import plan

    (document, _), _ = read(CorpusConfig(paths=str(rows), prompt="Q: {question}\nA: ", text="answer"))
    assert document.prompt == "Q: Where?\nA:"
    with pytest.raises(ConfigError, match=r"corpus\.messages: generate continues text"):
        plan._parsed(["corpus.messages=messages"])
