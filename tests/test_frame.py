"""The tokens around a document, for tokenizers of six families; and that whatever reads a document has the same."""

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from raylm import checkpoint, evaluate, generation, tokenizer
from raylm.config import TrainedTokenizer
from raylm.errors import ConfigError
from raylm.tokenizer import Frame

WORDS = sorted({*"the cat sat on a mat and saw one dog run far to sea".split()})
TEXT = "the cat sat on a mat and saw one dog"
LETTERS = sorted({*TEXT.replace(" ", "")})


def made(template=None, **special):
    """A tokenizer of WORDS behind <s> (1), </s> (2) and <mask> (3); `template` is what it puts around a text itself."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<mask>": 3, **{word: 4 + n for n, word in enumerate(WORDS)}}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        plain.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>", **special)


FAMILIES = {
    "GPT-2: BOS is EOS, nothing is put in front": (made(bos_token="</s>", eos_token="</s>"), Frame(2, 2)),
    "Llama: BOS is put in front": (made("<s> $A", bos_token="<s>", eos_token="</s>"), Frame(1, 2)),
    "Gemma with EOS behind, too": (made("<s> $A </s>", bos_token="<s>", eos_token="</s>"), Frame(1, 2)),
    "a BOS that is not put in front": (made(bos_token="<s>", eos_token="</s>"), Frame(2, 2)),
    "Qwen: no BOS": (made(eos_token="</s>"), Frame(2, 2)),
    "OPT: EOS is put in front": (made("</s> $A", bos_token="</s>", eos_token="</s>"), Frame(2, 2)),
    "BERT: [CLS] and [SEP]": (
        made("<s> $A </s>", cls_token="<s>", sep_token="</s>", eos_token="</s>", mask_token="<mask>"),
        Frame(1, 2),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_frame_is_what_the_tokenizer_itself_makes(family):
    known, expected = FAMILIES[family]
    assert tokenizer.frame(known) == expected


def test_another_prefix_can_be_said():
    known, _ = FAMILIES["a BOS that is not put in front"]
    prefixes = {prefix: tokenizer.frame(known, prefix) for prefix in ("bos", "eos", "none")}
    assert prefixes == {"bos": Frame(1, 2), "eos": Frame(2, 2), "none": Frame(None, 2)}
    with pytest.raises(ConfigError, match=r"tokenizer\.prefix=bos: the tokenizer has no begin-of-text token"):
        tokenizer.frame(FAMILIES["Qwen: no BOS"][0], "bos")


@pytest.mark.parametrize("prefix", ["auto", "bos", "eos", "none"])
@pytest.mark.parametrize("family", [*FAMILIES, "GPT2Tokenizer", "LlamaTokenizer"])
def test_an_exported_tokenizer_frames_a_text_as_its_model_was_trained(tmp_path, family, prefix):
    """As AutoTokenizer loads it, by whichever class."""
    known = FAMILIES[family][0] if family in FAMILIES else of_class(family)
    if prefix == "bos" and known.bos_token is None:
        with pytest.raises(ConfigError, match=r"tokenizer\.prefix=bos: the tokenizer has no begin-of-text token"):
            tokenizer.for_export(known, prefix, 32)
        return
    known.save_pretrained(tmp_path / "own")
    own = tokenizer.load(tmp_path / "own")
    tokenizer.for_export(own, prefix, 32).save_pretrained(tmp_path / "exported")
    found = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids, whole = own(TEXT, add_special_tokens=False)["input_ids"], own(TEXT)["input_ids"]
    start = whole.index(ids[0])
    token = tokenizer.frame(own, prefix).prefix
    before = [] if token is None else [token]
    framed = [*before, *whole[start:]]
    assert found(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert found(TEXT)["input_ids"] == framed
    if before != whole[:start]:
        assert found(TEXT, TEXT)["input_ids"] == framed * 2
    assert tokenizer.frame(found, prefix) == tokenizer.frame(own, prefix), "read again by raylm"
    settings = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 32
    assert not {"is_local", "local_files_only"} & {*settings}


def of_class(name):
    """A tokenizer of a class of transformers that has rules of its own."""
    if name == "LlamaTokenizer":
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, **{letter: 4 + n for n, letter in enumerate(LETTERS)}}
        return LlamaTokenizer(vocab=vocabulary, merges=[], bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    vocabulary = {"<s>": 0, "</s>": 1, "Ġ": 2, **{letter: 3 + n for n, letter in enumerate(LETTERS)}}
    return GPT2Tokenizer(vocab=vocabulary, merges=[], bos_token="<s>", eos_token="</s>", unk_token="</s>")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The directory of a small Llama, trained a little on `<s> document` as Llamas are."""
    directory = tmp_path_factory.mktemp("llama")
    trained(FAMILIES["Llama: BOS is put in front"][0], directory)
    return directory


def nll(directory, prefix):
    """Of TEXT behind a token, by hand in float64."""
    network = LlamaForCausalLM.from_pretrained(directory, dtype="float64")
    known = checkpoint.load(directory).tokenizer
    ids = torch.tensor([[prefix, *known(TEXT, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        likely = network(input_ids=ids).logits.log_softmax(-1)
    return -likely[0, :-1].gather(1, ids[0, 1:, None]).sum().item()


def test_evaluate_scores_a_llama_behind_its_begin_of_text_token(llama, tmp_path):
    """10 times less than behind its end-of-text token; Gemma 3 270M: 13.1 and 129.6."""
    (tmp_path / "text.txt").write_text(TEXT)
    found = evaluate.evaluate(str(llama), text=[f"{tmp_path}/text.txt"])
    assert found.record["nll"] == pytest.approx(nll(llama, 1), rel=1e-4)
    assert (found.record["prefix"], found.record["tokens"]) == ("<s>", 10)
    other = evaluate.evaluate(str(llama), ["tokenizer.prefix=eos"], text=[f"{tmp_path}/text.txt"])
    assert other.record["nll"] == pytest.approx(nll(llama, 2), rel=1e-4)
    assert other.record["nll"] > 2 * found.record["nll"]
    none = evaluate.evaluate(str(llama), ["tokenizer.prefix=none"], text=[f"{tmp_path}/text.txt"])
    assert (none.record["prefix"], none.record["tokens"]) == (None, 9)


def test_a_prompt_has_the_same_prefix(llama):
    settings = generation.resolve_settings(llama, {"max_new_tokens": 5})
    writer = generation.load(str(llama), settings, 0, False, 1, False)
    (text,) = writer.texts(["the cat"])
    assert text.text.startswith("the cat")
    seen = []
    plain = writer.network.forward

    def forward(input_ids=None, **rest):
        seen.append(input_ids.tolist())
        return plain(input_ids=input_ids, **rest)

    writer.network.forward = forward
    writer.texts(["the cat"])
    assert seen[0][0][0] == 1


# raylm, lm-evaluation-harness and a reference -----------------------------------------------------------------------

SCORED = {
    "GPT-2": "GPT-2: BOS is EOS, nothing is put in front",
    "Llama, Gemma": "Llama: BOS is put in front",
    "has a BOS, does not put it in front": "a BOS that is not put in front",
    "Qwen": "Qwen: no BOS",
}
"""Families of causal models: their names in docs/reliability.md, and in FAMILIES."""
MASKED = "BERT (WordPiece, masked)"


def trained(known, directory, steps=40):
    """A small Llama of a family of tokenizers, trained a little on documents in the family's frame."""
    expected = tokenizer.frame(known)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": known.bos_token_id, "eos_token_id": known.eos_token_id}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(known), **sizes, max_position_embeddings=32, **special))
    plain = known(f"{TEXT} run far to sea {TEXT}", add_special_tokens=False)["input_ids"]
    ids = torch.from_numpy(expected.around(plain))[None]
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(steps):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(directory)
    known.save_pretrained(directory)


def rolling(directory):
    """What lm-evaluation-harness has for TEXT, in nats: as it is, and told to add no BOS; and what it puts in front."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(directory), device="cpu", dtype="float32", batch_size=1)
    requests = [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
    (as_it_is,) = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    harness.add_bos_token = False
    (alone,) = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    return -as_it_is, -alone, harness.prefix_token_id


def masked_reference(directory):
    """Each token of TEXT masked in turn between [CLS] and [SEP], by hand in float64, in nats."""
    network = BertForMaskedLM.from_pretrained(directory, dtype="float64").eval()
    known = checkpoint.load(directory).tokenizer
    ids, total = torch.tensor([known(TEXT)["input_ids"]]), 0.0
    for place in range(1, ids.shape[1] - 1):
        hidden = ids.clone()
        hidden[0, place] = known.mask_token_id
        with torch.no_grad():
            total -= network(input_ids=hidden).logits[0, place].log_softmax(-1)[ids[0, place]].item()
    return total


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Family -> what raylm, the reference and the harness have, in nats, and the tokens that they put in front."""
    home = tmp_path_factory.mktemp("families")
    (home / "text.txt").write_text(TEXT)
    found = {}
    for number, (name, family) in enumerate(SCORED.items()):
        directory = home / str(number)
        trained(FAMILIES[family][0], directory, steps=12)
        record = evaluate.evaluate(str(directory), text=[f"{home}/text.txt"]).record
        prefix = FAMILIES[family][0].convert_tokens_to_ids(record["prefix"])
        as_it_is, alone, its_prefix = rolling(directory)
        found[name] = {
            "prefix": prefix,
            "raylm": record["nll"],
            "reference": nll(directory, prefix),
            "its_prefix": its_prefix,
            "harness": as_it_is,
            "harness_alone": alone,
            "its_reference": nll(directory, its_prefix),
        }
    directory = home / "masked"
    section = TrainedTokenizer(kind="wordpiece", vocab_size=300, special_tokens=("[SEP]", "[CLS]", "[PAD]", "[MASK]"))
    made = tokenizer.train([TEXT] * 9, section)
    made.cls_token, made.sep_token = "[CLS]", "[SEP]"
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    template = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    made.backend_tokenizer.post_processor = template
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(made), **sizes, max_position_embeddings=64, initializer_range=0.3)
    BertForMaskedLM(config).save_pretrained(directory)
    made.save_pretrained(directory)
    record = evaluate.evaluate(str(directory), ["eval.pseudo_perplexity=true"], text=[f"{home}/text.txt"]).record
    found[MASKED] = {"raylm": record["nll"], "reference": masked_reference(directory)}
    return found


@pytest.mark.parametrize("family", [*SCORED, MASKED])
def test_scores_are_those_of_a_float64_reference(scores, family):
    assert scores[family]["raylm"] == pytest.approx(scores[family]["reference"], rel=1e-5)


@pytest.mark.parametrize("family", SCORED)
def test_scores_are_those_of_lm_evaluation_harness(scores, family):
    """Where a tokenizer adds BOS itself, the harness scores that token, too, unless it is told to add none; and where
    one has a BOS that it does not add, the harness puts it in front, which the model has never seen there."""
    found = scores[family]
    assert found["harness_alone"] == pytest.approx(found["its_reference"], rel=1e-4)
    if found["prefix"] == found["its_prefix"]:
        assert found["harness_alone"] == pytest.approx(found["raylm"], rel=1e-4)
    if family == "Llama, Gemma":
        assert found["harness"] > found["raylm"] + 1
    else:
        assert found["harness"] == pytest.approx(found["harness_alone"], rel=1e-6)
    differs = family == "has a BOS, does not put it in front"
    assert (found["prefix"] != found["its_prefix"]) == differs
    assert (found["its_reference"] != found["reference"]) == differs


NUMBERS = ("raylm", "reference", "harness", "harness_alone")


def table(scores):
    """The rows of the table in docs/reliability.md."""
    for family, found in scores.items():
        own, its = ({None: None, 1: "BOS", 2: "EOS"}[found.get(key)] for key in ("prefix", "its_prefix"))
        numbers = [f"{found[key]:.4f}" if key in found else "-" for key in NUMBERS]
        yield [family, own or "[CLS] … [SEP]", *numbers[:2], its or "-", *numbers[2:]]


def test_the_documentation_has_these_figures(scores):
    """To 1 %: the models are trained here, and rounding differs between processors."""
    text = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text(encoding="utf-8")
    shown = {cells[0]: cells for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 7}
    for row in table(scores):
        (words, numbers), (expected_words, expected_numbers) = parted(shown[row[0]]), parted(row)
        assert words == expected_words
        assert numbers == pytest.approx(expected_numbers, rel=0.01)


def parted(cells):
    """(words, numbers) of a row of the table."""
    numbers = [cell for cell in cells if re.fullmatch(r"[\d.]+", cell)]
    return [cell for cell in cells if cell not in numbers], [float(cell) for cell in numbers]
