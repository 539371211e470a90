"""The tokens around a document, for tokenizers of six families; and that whatever reads a document has the same."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
)

from raylm import checkpoint, evaluate, generation, tokenizer
from raylm.errors import ConfigError
from raylm.perplexity import score_documents
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
    """As AutoTokenizer loads it, by whichever class; auto leaves what the tokenizer's makers put around a text."""
    known = FAMILIES[family][0] if family in FAMILIES else of_class(family)
    if prefix == "bos" and known.bos_token is None:
        pytest.skip("it has none")
    known.save_pretrained(tmp_path / "own")
    own = tokenizer.load(tmp_path / "own")
    tokenizer.exported(own, prefix, 32).save_pretrained(tmp_path / "exported")
    found = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids, whole = own(TEXT, add_special_tokens=False)["input_ids"], own(TEXT)["input_ids"]
    start = whole.index(ids[0])
    token = tokenizer.frame(own, prefix).prefix
    before = whole[:start] if prefix == "auto" else [] if token is None else [token]
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
    known, _ = FAMILIES["Llama: BOS is put in front"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(known), **sizes, max_position_embeddings=32, bos_token_id=1, eos_token_id=2)
    )
    ids = torch.tensor([known(f"{TEXT} run far to sea {TEXT}")["input_ids"]])
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(40):
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.save_pretrained(directory)
    known.save_pretrained(directory)
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
    how = generation.settings(llama, {"max_new_tokens": 5})
    writer = generation.load(str(llama), how, 0, False, 1, False)
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


def test_scores_are_those_of_lm_evaluation_harness(llama):
    """Its own rolling likelihood scores the begin-of-text token that such a tokenizer adds as a token of the text, so
    it is asked for the likelihood of the text as a continuation of nothing."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(llama), device="cpu", dtype="float32", batch_size=1, add_bos_token=False)
    assert harness.prefix_token_id == 1
    requests = [Instance("loglikelihood_rolling", {}, (TEXT,), 0)]
    (expected,) = harness.loglikelihood_rolling(requests, disable_tqdm=True)
    trained = checkpoint.load(llama)
    ids = np.array(trained.tokenizer(TEXT, add_special_tokens=False)["input_ids"])

    class Documents(list):
        def document_bytes(self, index):
            return len(TEXT)

    rows = score_documents(trained.model, Documents([ids]), frame=trained.frame(), context=trained.context)
    assert rows[0, 0] == pytest.approx(-expected, rel=1e-4)
