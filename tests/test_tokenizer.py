import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from raylm import tokenizer
from raylm.config import ModelConfig, TokenizerConfig, TrainedTokenizer
from raylm.errors import ConfigError, DataError
from raylm.tokenizer import encoders, training

TEXTS = ["def hello(name):\n    return f'hello {name}'\n", "for name in names:\n    hello(name)\n"] * 20

HAS_FASTOKENS = importlib.util.find_spec("fastokens") is not None
ENCODERS = ["tokenizers", *["fastokens"] * HAS_FASTOKENS]

needs_fastokens = pytest.mark.skipif(not HAS_FASTOKENS, reason="fastokens is not installed: it has no wheel here")


@pytest.fixture
def trained(tmp_path):
    tokenizer.train(TEXTS, TrainedTokenizer(vocab_size=280)).save_pretrained(tmp_path)
    return tmp_path


def test_any_text_survives_a_trained_tokenizer(trained):
    loaded = tokenizer.load(trained)
    text = "naïve  spaces\t\r\n\0 \u2028 😀 def hello"
    assert loaded.decode(loaded(text).input_ids) == text
    assert len(loaded) == 280
    assert loaded.eos_token == "<|endoftext|>"


def test_training_twice_gives_the_same_tokenizer():
    section = TrainedTokenizer(vocab_size=300)
    one, two = (tokenizer.train(iter(TEXTS), section).backend_tokenizer.to_str() for _ in range(2))
    assert one == two


def test_the_encoder_gives_the_tokenizers_ids(trained):
    texts = [*TEXTS, "", "x", "<|endoftext|> inside"]
    loaded = tokenizer.load(trained)
    expected = [loaded(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in texts]
    for name in ENCODERS:
        ids, lengths = tokenizer.encoder(str(trained), name)(texts)
        assert ids.dtype == np.uint16
        assert lengths.tolist() == [len(row) for row in expected]
        assert ids.tolist() == [token for row in expected for token in row]


def unigram():
    """As T5's: its special tokens are pieces like others, and of all pieces the likeliest."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), ("▁", -2.0), *((letter, -5.0) for letter in "abs</>x")]
    made = Tokenizer(models.Unigram(pieces, 0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def words():
    """Words between spaces, and the special tokens among them."""
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "x": 3}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")


def whole_words():
    """BPE that takes a word as a whole if it is a piece, as Llama 3's does."""
    letters = {letter: 1 + number for number, letter in enumerate("abs</>x")}
    made = Tokenizer(models.BPE({"</s>": 0, **letters}, [], ignore_merges=True, unk_token="x"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def of_kind(kind, *special):
    return lambda: tokenizer.train(
        [*TEXTS, "a </s> <|endoftext|> [SEP] x"] * 3,
        TrainedTokenizer(kind=kind, vocab_size=300, special_tokens=special),
    )


FAMILIES = {
    "byte-level BPE": of_kind("byte_bpe", "<|endoftext|>", "<mask>"),
    "WordPiece": of_kind("wordpiece", "[SEP]", "[MASK]"),
    "Unigram": of_kind("unigram", "</s>", "<pad>"),
    "Unigram without pre-tokenization": unigram,
    "words": words,
    "BPE of whole words": whole_words,
    "written in Python": ByT5Tokenizer,
}


@pytest.mark.parametrize(
    ("name", "family"),
    [*(("tokenizers", family) for family in FAMILIES), *((name, "byte-level BPE") for name in ENCODERS[1:])],
)  # fastokens 0.3 reads no other of them: choose_encoder takes the other encoder then
def test_text_that_spells_a_special_token_is_text(tmp_path, family, name):
    """And all other text has the ids that transformers gives it."""
    FAMILIES[family]().save_pretrained(tmp_path)
    loaded = tokenizer.load(tmp_path)
    encode = tokenizer.encoder(str(tmp_path), name)
    special = [token for token in loaded.all_special_tokens if token != loaded.unk_token]
    for token in special:
        for text in (token, f"a{token} {token} x", f"{token}{token}", f"a {token}"):
            ids, _ = encode([text])
            assert len(ids) > 0
            assert not {*ids.tolist()} & {*loaded.convert_tokens_to_ids(special)}, text
            assert encode.special_tokens_in(text) == text.count(token)
    texts = ["a x", "", " a  bs", TEXTS[0]]
    expected = [id for text in texts for id in loaded(text, add_special_tokens=False).input_ids]
    assert encode(texts)[0].tolist() == expected
    assert encode.special_tokens_in(TEXTS[0]) == 0


def test_text_with_the_name_of_a_special_token_comes_back_as_it_was(trained):
    text = "x<|endoftext|>y <|endoftext|>"
    loaded = tokenizer.load(trained)
    for name in ENCODERS:
        assert loaded.decode(tokenizer.encoder(str(trained), name)([text])[0].tolist()) == text


def test_a_special_token_of_a_single_character_is_text_where_text_has_it(tmp_path):
    made = Tokenizer(models.WordLevel({"\n": 0, "a": 1, "b": 2}, unk_token="b"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="\n").save_pretrained(tmp_path)
    encode = tokenizer.encoder(str(tmp_path), "tokenizers")
    assert encode(["a\nb"])[0].tolist() == [1, 0, 2]
    assert encode.special_tokens_in("a\nb") == 0


def test_a_vocabulary_without_some_byte_is_an_error_that_names_it(trained):
    """It would be dropped from the text, without a word."""
    file = trained / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] = {
        piece if piece not in ("Ċ", "ÿ") else f"unused {piece}": id for piece, id in content["model"]["vocab"].items()
    }
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    assert tokenizer.load(trained)("a\nb").input_ids == tokenizer.load(trained)("ab").input_ids
    for name in ENCODERS:
        encode = tokenizer.encoder(str(trained), name)
        assert len(encode(["ab", "ÿ"])[0]) == 4  # UTF-8 does not have the byte 0xff
        with pytest.raises(
            DataError, match=r"cannot spell the document that starts with 'a\\nb': it has no byte 0x0a \('\\n'\)"
        ):
            encode(["ab", "a\nb"])


def test_a_vocabulary_of_characters_that_lacks_one_without_an_unknown_token_is_an_error(tmp_path):
    made = Tokenizer(models.BPE({"<s>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>").save_pretrained(tmp_path / "bpe")
    encode = tokenizer.encoder(str(tmp_path / "bpe"), "tokenizers")
    assert encode(["ab ba"])[0].tolist() == [3, 2, 1]
    with pytest.raises(DataError, match=r"cannot spell the document that starts with 'aé': it has no 'é'"):
        encode(["ab", "aé"])
    pieces = ["<s>", "a", *(f"<0x{byte:02X}>" for byte in range(256) if byte != 0xC3)]
    made = Tokenizer(models.BPE({piece: id for id, piece in enumerate(pieces)}, [], byte_fallback=True))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<s>").save_pretrained(tmp_path / "fallback")
    encode = tokenizer.encoder(str(tmp_path / "fallback"), "tokenizers")
    assert len(encode(["ab東"])[0]) == 5
    with pytest.raises(
        DataError, match=r"cannot spell the document that starts with 'aé': it has no byte 0xc3 \('é'\)"
    ):
        encode(["ab", "aé"])
    made = Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0)], None))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>").save_pretrained(tmp_path / "unigram")
    encode = tokenizer.encoder(str(tmp_path / "unigram"), "tokenizers")
    with pytest.raises(DataError, match=r"cannot spell the document that starts with 'ab': .*unknown token"):
        encode(["a", "ab"])


def test_what_a_vocabulary_cannot_spell_has_the_id_of_its_unknown_token(trained, tmp_path):
    tmp_path = tmp_path / "other"
    for made, token in ((unigram(), "<unk>"), (words(), "<unk>"), (of_kind("wordpiece", "[SEP]")(), "[UNK]")):
        made.save_pretrained(tmp_path)
        tokenizer.encoder.cache_clear()
        encode = tokenizer.encoder(str(tmp_path), "tokenizers")
        assert encode.unknown_id == tokenizer.unknown_id(made) == made.convert_tokens_to_ids(token)
        assert encode.unknown_id in encode(["a 東京"])[0]
    assert tokenizer.encoder(str(trained), "tokenizers").unknown_id is None


def test_a_tokenizer_without_end_of_text_is_refused_with_the_way_out(trained):
    config = (trained / "tokenizer_config.json").read_text()
    (trained / "tokenizer_config.json").write_text(config.replace('"eos_token"', '"not_eos_token"'))
    with pytest.raises(DataError, match=r"no end-of-text token.*tokenizer\.eos_token"):
        tokenizer.load(trained)


def chosen(path, gguf_file=None):
    return tokenizer.choose(TokenizerConfig(path=str(path), gguf_file=gguf_file), ModelConfig())


@pytest.mark.parametrize("key", ["tokenizer.path", "model.path"])
def test_a_directory_without_a_tokenizer_is_refused_before_anything_starts(tmp_path, key):
    """By every verb, whichever setting names the directory."""

    def refused(path, why):
        sections = (
            (TokenizerConfig(path=path), ModelConfig())
            if key == "tokenizer.path"
            else (
                TokenizerConfig(),
                ModelConfig(path=path),
            )
        )
        with pytest.raises(ConfigError, match=rf"^{key}={path}: {why}") as raised:
            tokenizer.choose(*sections)
        assert raised.value.where == key

    refused(str(tmp_path / "gone"), "there is no such directory")
    refused(str(tmp_path), "the directory is empty")
    (tmp_path / "config.json").write_text("{}")
    refused(str(tmp_path), "there is no tokenizer in it.*; give tokenizer.path, or tokenizer.train")
    (tmp_path / "q4.gguf").touch()
    refused(str(tmp_path), f".*; give {key.split('.')[0]}.gguf_file=q4.gguf")


def test_a_vocabulary_alone_does_not_say_how_text_is_split(trained, tmp_path):
    """It is that of GPT-2, RoBERTa or Qwen; a line of JSON tells, and then it loads."""
    model = json.loads((trained / "tokenizer.json").read_text())["model"]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "vocab.json").write_text(json.dumps(model["vocab"]))
    (bare / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    with pytest.raises(
        ConfigError, match=r"merges.txt, vocab.json alone .*tokenizer_config.json beside them, (\{.*\})"
    ):
        chosen(bare)
    (bare / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    loaded = tokenizer.load_section(chosen(bare))
    assert loaded(TEXTS[0]).input_ids == tokenizer.load(trained)(TEXTS[0]).input_ids


def test_a_damaged_tokenizer_is_one_line_that_names_the_file(trained):
    (trained / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=rf"^tokenizer.path={trained}: tokenizer.json is damaged: Expecting .*\Z"):
        tokenizer.load_section(chosen(trained))


def test_a_tokenizer_that_transformers_reads_by_other_rules_is_named(tmp_path, capsys):
    made = tokenizer.train(TEXTS + ["Hello"] * 9, TrainedTokenizer(kind="wordpiece", vocab_size=300))
    made.save_pretrained(tmp_path)
    tokenizer.load_section(chosen(tmp_path))
    assert capsys.readouterr().err == ""
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
    tokenizer.load_section(chosen(tmp_path))
    tokenizer.load_section(chosen(tmp_path))
    said = capsys.readouterr().err
    assert said.count(f"tokenizer.path={tmp_path}: transformers reads 'A word' as ") == 1
    assert "do_lower_case" in said
    file.write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer", "do_lower_case": False}))
    tokenizer.load_section(chosen(tmp_path))
    assert capsys.readouterr().err == ""


def test_padding_is_no_rule_of_reading(tmp_path, capsys):
    """Sentence encoders come with it in their tokenizer.json."""
    made = tokenizer.train(TEXTS, TrainedTokenizer(vocab_size=300))
    made.backend_tokenizer.enable_padding(length=50)
    made.save_pretrained(tmp_path)
    tokenizer.load_section(chosen(tmp_path))
    assert capsys.readouterr().err == ""


def test_a_vocabulary_that_knows_no_probe_is_found_out_by_its_rules(tmp_path, capsys):
    """One of Arabic, whose vowel signs BertTokenizer takes away: here every word with one falls into its letters."""
    text = "كِتَابٌ جَدِيدٌ فِي بَيْتٍ قَدِيمٍ"
    words = dict.fromkeys(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *text.split()])
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=False)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    known = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="[SEP]", unk_token="[UNK]", pad_token="[PAD]")
    known.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "BertTokenizer"}))
    loaded = tokenizer.load_section(chosen(tmp_path))
    assert loaded(text, add_special_tokens=False).input_ids != known(text, add_special_tokens=False).input_ids
    said = capsys.readouterr().err
    assert f"tokenizer.path={tmp_path}: transformers reads " in said
    assert "BertTokenizer has rules of its own, set in tokenizer_config.json by settings such as do_lower" in said
    empty = Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0)], None))  # to which every probe is unknown
    PreTrainedTokenizerFast(tokenizer_object=empty, eos_token="</s>").save_pretrained(tmp_path / "empty")
    tokenizer.load_section(chosen(tmp_path / "empty"))
    assert capsys.readouterr().err == ""


def test_the_models_own_tokenizer_is_the_default():
    assert tokenizer.choose(TokenizerConfig(), ModelConfig(path="some/model")).path == "some/model"
    assert tokenizer.choose(TokenizerConfig(path="mine"), ModelConfig(path="some/model")).path == "mine"
    with pytest.raises(ConfigError, match=r"tokenizer\.path or tokenizer\.train"):
        tokenizer.choose(TokenizerConfig(), ModelConfig(config={"model_type": "gpt2"}))


def test_the_models_own_tokenizer_is_of_its_revision_and_gguf_file():
    model = ModelConfig(path="some/model", revision="v2", gguf_file="q4.gguf")
    own = TokenizerConfig(path="some/model", revision="v2", gguf_file="q4.gguf")
    assert tokenizer.choose(TokenizerConfig(), model) == own
    assert tokenizer.choose(TokenizerConfig(revision="v3"), model).revision == "v3"
    assert tokenizer.choose(TokenizerConfig(eos_token="</s>"), model).eos_token == "</s>"
    other = TokenizerConfig(path="other")
    assert tokenizer.choose(other, model) == other


@pytest.mark.parametrize(
    ("kind", "special"), [("wordpiece", ["[SEP]", "[PAD]", "[MASK]"]), ("unigram", ["</s>", "<pad>"])]
)
def test_other_kinds_of_tokenizers(tmp_path, kind, special):
    section = TrainedTokenizer(kind=kind, vocab_size=300, special_tokens=special)
    trained = tokenizer.train(TEXTS, section)
    trained.save_pretrained(tmp_path)
    loaded = tokenizer.load(tmp_path)
    assert loaded.eos_token == special[0]
    assert loaded.pad_token == special[1]
    assert loaded.mask_token == (special[2] if kind == "wordpiece" else None)
    assert loaded.decode(loaded("for name in names", add_special_tokens=False).input_ids) == "for name in names"
    assert loaded.unk_token_id in loaded("\u2603", add_special_tokens=False).input_ids
    again = tokenizer.train(iter(TEXTS), section)
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


def dna(num_chars, seed=0):
    return "".join(random.Random(seed).choices("ACGT", k=num_chars))


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
def test_text_without_white_space_has_pre_tokens_of_a_limited_length(tmp_path, monkeypatch, caplog, kind):
    """It is said, and transformers alone and both encoders keep to it."""
    monkeypatch.setattr(training, "LONG_CHARS", 5000)
    texts = [dna(20_000), "naïve text of 東京, as ever\n\n" * 9]
    with caplog.at_level("INFO", logger="raylm"):
        made = tokenizer.train(texts, TrainedTokenizer(kind=kind, vocab_size=600))
    assert "words of up to 20,000 characters; the tokenizer cuts text without white space every 64" in caplog.text
    made.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    pre_tokenizer = plain.backend_tokenizer.pre_tokenizer
    for text in (*texts, " " * 500, "\n" * 500, "東" * 500):
        longest = max((len(piece) for piece, _ in pre_tokenizer.pre_tokenize_str(text)), default=0)
        assert longest <= 3 * 64, "in bytes"
        ids = plain(text, add_special_tokens=False)["input_ids"]
        for name in ENCODERS if kind == "byte_bpe" else ["tokenizers"]:
            assert tokenizer.Encoder(str(tmp_path), name)([text])[0].tolist() == ids
    pieces = pre_tokenizer.pre_tokenize_str(texts[0])
    assert len(pieces) >= 20_000 // 64
    assert made.unk_token_id is None or made.unk_token_id not in plain(texts[0])["input_ids"]


def test_a_few_long_words_change_nothing(caplog):
    """A tokenizer of ordinary text is the one that it was: its file is in golden/manifest.json."""
    with caplog.at_level("INFO", logger="raylm"):
        made = tokenizer.train([*TEXTS, "=" * 1000, dna(1000)], TrainedTokenizer(vocab_size=300))
    assert caplog.text == ""
    assert type(made.backend_tokenizer.pre_tokenizer).__name__ == "ByteLevel"


def test_text_in_which_no_word_is_repeated_is_sampled(monkeypatch, caplog):
    monkeypatch.setitem(training.DIFFERENT_CHARS, "unigram", 20_000)
    section = TrainedTokenizer(kind="unigram", vocab_size=300)
    with caplog.at_level("INFO", logger="raylm"):
        made = tokenizer.train([dna(50_000, seed) for seed in range(2)], section)
    assert "trained on 20% of the sample" in caplog.text
    same = tokenizer.train([dna(50_000, seed)[:10_000] for seed in range(2)], section)
    assert made.backend_tokenizer.to_str() == same.backend_tokenizer.to_str()
    caplog.clear()
    tokenizer.train(["every word of it again and again " * 1000], section)
    assert caplog.text == ""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "num_chars"), [("byte_bpe", 2_000_000), ("unigram", 300_000)])
def test_training_on_text_without_white_space_ends(kind, num_chars):
    """Without a limit the smaller of them takes hours. An own process can be killed, whatever the library waits for."""
    program = (
        "import random; from raylm import tokenizer; from raylm.config import TrainedTokenizer; "
        f"text = ''.join(random.Random(0).choices('ACGT', k={num_chars})); "
        f"print(len(tokenizer.train([text], TrainedTokenizer(kind={kind!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout) == 8192


def test_an_end_of_text_token_can_be_named(trained):
    config = (trained / "tokenizer_config.json").read_text()
    (trained / "tokenizer_config.json").write_text(config.replace('"eos_token"', '"not_eos_token"'))
    assert tokenizer.load(trained, eos_token="<|endoftext|>").eos_token_id == 0
    with pytest.raises(ConfigError, match=r"^tokenizer\.eos_token=<eos>: it is not among the 280 tokens"):
        tokenizer.load(trained, eos_token="<eos>")


@needs_fastokens
def test_the_fast_encoder_is_chosen_where_it_gives_the_same_ids(trained):
    chosen = tokenizer.choose_encoder(str(trained), TEXTS)
    assert chosen["name"] == "fastokens"
    assert chosen["checked_documents"] == len(TEXTS)
    assert chosen["differs"] is None


@needs_fastokens
def test_a_fast_encoder_that_differs_is_not_used(trained, monkeypatch):
    right = encoders._Fast.__call__

    def wrong(self, texts):
        ids, lengths = right(self, texts)
        return (ids + 1 if "names" in texts[0] else ids), lengths

    monkeypatch.setattr(encoders._Fast, "__call__", wrong)
    chosen = tokenizer.choose_encoder(str(trained), TEXTS)
    assert chosen["name"] == "tokenizers"
    assert chosen["differs"].startswith("fastokens gives other ids than the tokenizer for 'for name in names:")
    assert chosen["checked_documents"] == 2


@pytest.mark.parametrize(("kind", "special"), [("wordpiece", "[SEP]"), ("unigram", "</s>")])
def test_a_kind_that_the_fast_encoder_does_not_read_is_encoded_by_the_slow_one(tmp_path, kind, special):
    section = TrainedTokenizer(kind=kind, vocab_size=300, special_tokens=special)
    tokenizer.train(TEXTS, section).save_pretrained(tmp_path)
    chosen = tokenizer.choose_encoder(str(tmp_path), TEXTS)
    ids, _ = tokenizer.encoder(str(tmp_path), chosen["name"])(TEXTS)
    loaded = tokenizer.load(tmp_path)
    assert ids.tolist() == [token for text in TEXTS for token in loaded(text, add_special_tokens=False).input_ids]


def test_the_version_of_a_tokenizer_is_that_of_its_files(trained):
    section = TokenizerConfig(path=str(trained))
    before = tokenizer.fingerprint(section)
    (trained / "model.safetensors").write_text("weights are none of it")
    assert tokenizer.fingerprint(section) == before
    (trained / "tokenizer.json").write_text((trained / "tokenizer.json").read_text() + " ")
    assert tokenizer.fingerprint(section) != before
    assert tokenizer.fingerprint(TokenizerConfig(train=TrainedTokenizer())) == {}


class Hub(ThreadingHTTPServer):
    """A Hugging Face Hub with one repository, org/model: its files, at a commit that is new whenever one changes."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), HubRequest)
        self.files, self.asked = files, []

    @property
    def commit(self):
        return hashlib.sha1(json.dumps({n: self.checksum(n) for n in sorted(self.files)}).encode()).hexdigest()

    def checksum(self, name):
        """As git has it."""
        return hashlib.sha1(b"blob %d\0" % len(self.files[name]) + self.files[name]).hexdigest()


class HubRequest(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.asked.append(self.path)
        if "/tree/" in path:  # whether there are templates of chats
            return self.answer(b"[]")
        if path.startswith("/api/models/org/model"):
            siblings = [
                {"rfilename": name, "size": len(content), "blobId": hub.checksum(name)}
                for name, content in hub.files.items()
            ]
            return self.answer(json.dumps({"id": "org/model", "sha": hub.commit, "siblings": siblings}).encode())
        name = path.rpartition("/")[2]
        if path.startswith("/org/model/resolve/") and name in hub.files:
            return self.answer(hub.files[name], **{"X-Repo-Commit": hub.commit, "ETag": f'"{hub.checksum(name)}"'})
        return self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": hub.commit})

    do_HEAD = do_GET

    def answer(self, content, status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


FINGERPRINT = """
import json, os, sys
from raylm import tokenizer, tokens
from raylm.config import CorpusConfig, TokenizerConfig
section = TokenizerConfig(path="org/model", revision=sys.argv[1] or None)
if "load" in sys.argv:
    tokenizer.load_section(section)
print(tokens.fingerprint(CorpusConfig(), section, []), json.dumps(tokenizer.fingerprint(section)))
"""


def test_a_commit_to_the_readme_of_a_tokenizer_on_the_hub_changes_nothing(trained, tmp_path):
    """Nor does it to ask for the commit by its name, or to be offline: a stopped run goes on, its tokens are there."""
    names = ("tokenizer.json", "tokenizer_config.json")
    hub = Hub({name: (trained / name).read_bytes() for name in names} | {"README.md": b"A model."})
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
    }

    def fingerprint(revision="", *more, offline="0"):
        command = [sys.executable, "-c", FINGERPRINT, revision, *more]
        told = subprocess.run(command, env=environment | {"HF_HUB_OFFLINE": offline}, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        return told.stdout

    first, commit = fingerprint("", "load"), hub.commit
    assert set(json.loads(first.partition(" ")[2])) == {*names}
    hub.files["README.md"] = b"A better model."
    assert hub.commit != commit
    assert fingerprint() == first
    assert fingerprint(hub.commit) == first
    assert fingerprint(offline="1") == first
    assert any(asked.startswith("/api/models/org/model") for asked in hub.asked)
    hub.files["tokenizer.json"] += b" "
    assert fingerprint() != first
    hub.shutdown()


@pytest.mark.parametrize("kind", ["byte_bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize("words", ["hello naïve {name}\n\n    return   x", "ab cd\n"])
def test_a_long_document_in_parts_has_the_ids_of_the_whole(tmp_path, monkeypatch, kind, words):
    tokenizer.train(TEXTS, TrainedTokenizer(kind=kind, vocab_size=300)).save_pretrained(tmp_path)
    rng = random.Random(0)
    text = "".join(rng.choice([*words, " ", "\n", "return", " for"]) for _ in range(30_000))
    encode = encoders._Slow(str(tmp_path))
    whole = encode([text])[0]
    calls = []
    monkeypatch.setattr(encoders, "LONG", 5000)
    monkeypatch.setattr(encoders, "OVERLAP", 1000)
    joint = encoders._joint
    monkeypatch.setattr(encoders, "_joint", lambda *arguments: calls.append(joint(*arguments)) or calls[-1])
    ids, lengths = encode([text, "short"])
    assert ids[: lengths[0]].tolist() == whole.tolist()
    assert len(calls) > 5
    assert None not in calls


def test_a_long_document_of_one_word_is_encoded_as_a_whole(trained, monkeypatch):
    encode = encoders._Slow(str(trained))
    whole = encode(["hello" * 5000])[0]
    monkeypatch.setattr(encoders, "LONG", 5000)
    monkeypatch.setattr(encoders, "OVERLAP", 1000)
    assert encode(["hello" * 5000])[0].tolist() == whole.tolist()


def test_the_tokenizer_of_a_gguf_file(tmp_path):
    import gguf

    made = tokenizer.train(TEXTS, TrainedTokenizer(vocab_size=280))
    model = json.loads(made.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_token_types([3] + [1] * (len(made) - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for key, value in {"block_count": 1, "context_length": 64, "embedding_length": 8, "head_count": 1}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_tensor("token_embd.weight", np.zeros((len(made), 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    section = TokenizerConfig(path=str(tmp_path), gguf_file="model.gguf")
    loaded = tokenizer.load_section(section)
    assert loaded.eos_token_id == 0
    assert loaded(TEXTS[0]).input_ids == made(TEXTS[0]).input_ids
    assert list(tokenizer.fingerprint(section)) == ["model.gguf"]


def test_ids_are_stored_in_two_bytes_where_they_fit():
    assert tokenizer.id_type({"a": 0, "b": 65_535}) == np.uint16
    assert tokenizer.id_type({"a": 0, "b": 65_536}) == np.uint32
