import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from raylm import checkpoint, tokenizer
from raylm.config import EvalConfig, TrainedTokenizer
from raylm.errors import ConfigError
from raylm.perplexity import MaskedTokens, Score, Window, context_of, first_documents, score, score_documents, windows
from raylm.tokenizer import Frame

CONTEXT = 8
EOS = 0
FRAME = Frame(EOS, EOS)


class Documents(list):
    def document_bytes(self, index):
        return 3 * len(self[index])

    def answers(self, index):
        return None


class EveryThird:
    """Keywords, as far as scoring looks at them: the tokens that 3 divides."""

    def marked(self, row):
        return row % 3 == 0


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors this small are quicker on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    sizes = {"vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForMaskedLM(BertConfig(vocab_size=23, max_position_embeddings=CONTEXT, **sizes)).eval()


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(2)
    return Documents(random.integers(1, 23, length).astype(np.uint16) for length in [1, 5, 7, 8, 9, 16, 17, 40, 3, 25])


def reference(network, documents, context, stride):
    """Straight from the definition, a token at a time, in float64: (nll, tokens), and nll of every third token."""
    precise = GPT2LMHeadModel(network.config).double().eval()
    precise.load_state_dict(network.state_dict())
    nll, tokens, of_thirds = 0.0, 0, 0.0
    for document in documents:
        text = [EOS, *document.tolist()]
        done = 0  # tokens of the document scored so far
        while done < len(document):
            end = min(len(document), context if done == 0 else done + stride)
            window = text[max(0, end - context) : end]
            with torch.no_grad():
                chance = precise(torch.tensor([window])).logits[0].log_softmax(-1)
            for token in range(done, end):
                position = token - (end - len(window))
                nll -= chance[position, document[token]].item()
                of_thirds -= chance[position, document[token]].item() if document[token] % 3 == 0 else 0
                tokens += 1
            done = end
    return nll, tokens, of_thirds


@pytest.mark.parametrize(
    ("positions", "given", "expected"),
    [(1024, None, 1024), (131_072, None, 8192), (None, None, 512), (131_072, 100_000, 100_000), (None, 9000, 9000)],
)
def test_the_context_of_a_window(positions, given, expected):
    """The model's, or the block size where that is without end; at most 8,192 unless eval.context says more."""
    assert context_of(EvalConfig(context=given), positions, 512) == expected


def test_a_context_that_the_model_does_not_have():
    with pytest.raises(ConfigError, match=r"eval.context must be at most 1024, the positions of the model, got 2000"):
        context_of(EvalConfig(context=2000), 1024, 512)


def test_windows_of_a_document_of_six_tokens():
    assert list(windows(6, context=4, stride=4)) == [Window(0, 4, 4), Window(2, 6, 2)]


@pytest.mark.parametrize("stride", [1, 3, 8, 100])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 40])
def test_every_token_is_scored_exactly_once(length, stride):
    scored = [t for w in windows(length, CONTEXT, stride) for t in range(w.end - w.scored, w.end)]
    assert scored == list(range(length))
    assert all(w.end - w.start <= CONTEXT for w in windows(length, CONTEXT, stride))


@pytest.mark.parametrize("stride", [1, 3, CONTEXT])
def test_equals_a_naive_float64_reference(network, documents, stride):
    nll, tokens, of_thirds = reference(network, documents, CONTEXT, stride)
    found = score(network, documents, frame=FRAME, context=CONTEXT, stride=stride, keywords=EveryThird())
    assert found.tokens == tokens == sum(map(len, documents))
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.bytes == 3 * tokens
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / (3 * tokens), rel=1e-6)
    assert found.keyword_nll == pytest.approx(of_thirds, rel=1e-6)
    assert found.keyword_tokens == sum((document % 3 == 0).sum() for document in documents)


@pytest.mark.parametrize("prefix", [1, None])
def test_another_prefix_or_none(network, documents, prefix):
    """By hand, for documents of one window; without a prefix their first tokens are neither scored nor counted,
    nor are the bytes of these."""
    short = Documents(document for document in documents if len(document) < CONTEXT)
    rows = score_documents(network, short, frame=Frame(prefix, EOS), context=CONTEXT, keywords=EveryThird())
    for row, document in zip(rows, short, strict=True):
        text = torch.tensor([*([] if prefix is None else [prefix]), *document.tolist()])
        with torch.no_grad():
            likely = network(input_ids=text[None]).logits[0].log_softmax(-1)
        each = -likely[:-1].gather(1, text[1:, None])[:, 0].double()
        assert row[0] == pytest.approx(each.sum().item(), rel=1e-5)
        assert row[1] == len(text) - 1
        assert row[2] == 3 * (len(text) - 1)
        assert row[3] == pytest.approx(each[text[1:] % 3 == 0].sum().item(), rel=1e-5)
        assert row[4] == (text[1:] % 3 == 0).sum()


@pytest.mark.parametrize("batch_tokens", [1, 20, 64, 100_000])
def test_does_not_depend_on_the_batch(network, documents, batch_tokens):
    how = {"frame": FRAME, "context": CONTEXT, "keywords": EveryThird()}
    found = score(network, documents, batch_tokens=batch_tokens, **how)
    expected = score(network, documents, **how)
    assert (found.tokens, found.bytes, found.keyword_tokens) == (
        expected.tokens,
        expected.bytes,
        expected.keyword_tokens,
    )
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert found.keyword_nll == pytest.approx(expected.keyword_nll, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(0, 20), max_size=4), min_size=1, max_size=4),
    stride=st.integers(1, 9),
    batch_tokens=st.sampled_from([1, 13, 64, 4096]),
)
def test_scores_of_sets_add_up_to_that_of_all_their_documents(network, lengths, stride, batch_tokens):
    random = np.random.default_rng(5)
    sets = [Documents(random.integers(1, 23, length).astype(np.uint16) for length in each) for each in lengths]
    everything = Documents(document for documents in sets for document in documents)
    how = {"frame": FRAME, "context": CONTEXT, "stride": stride, "keywords": EveryThird()}
    whole = score(network, everything, batch_tokens=batch_tokens, **how)
    found = sum((score(network, documents, **how) for documents in sets), Score())
    assert (found.tokens, found.bytes, found.keyword_tokens) == (whole.tokens, whole.bytes, whole.keyword_tokens)
    assert found.nll == pytest.approx(whole.nll, rel=1e-6)
    assert found.keyword_nll == pytest.approx(whole.keyword_nll, rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_a_masked_model_predicts_each_token_from_all_the_others_in_its_window(bert, batch_tokens):
    documents = Documents(np.random.default_rng(4).integers(4, 23, length) for length in [1, 6, 7, 15])
    expected, of_thirds = [], []
    for document in documents:
        nll, thirds = 0.0, 0.0
        for start in range(0, len(document), CONTEXT - 2):
            window = [1, *document[start : start + CONTEXT - 2].tolist(), 2]
            for place in range(1, len(window) - 1):
                shown = torch.tensor([[*window[:place], 3, *window[place + 1 :]]])
                with torch.no_grad():
                    each = bert(shown).logits[0, place].log_softmax(-1)[window[place]].item()
                nll -= each
                thirds -= each if window[place] % 3 == 0 else 0
        expected.append(nll)
        of_thirds.append(thirds)
    masked = MaskedTokens(mask_id=3, frame=Frame(1, 2), every=True)
    how = {"frame": FRAME, "context": CONTEXT, "masked": masked, "batch_tokens": batch_tokens, "keywords": EveryThird()}
    rows = score_documents(bert, documents, **how)
    assert rows[:, 0] == pytest.approx(expected, rel=1e-5)
    assert rows[:, 1].tolist() == [1, 6, 7, 15]
    assert rows[:, 3] == pytest.approx(of_thirds, rel=1e-5)
    assert rows[:, 4].tolist() == [sum(document % 3 == 0) for document in documents]


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
def test_a_masked_model_is_scored_on_a_fixed_part_of_the_tokens(bert, batch_tokens):
    """15 % of each document, at least one token, masked together; its nll is that of all its tokens at this rate."""
    documents = Documents(
        np.random.default_rng(4).integers(4, 23, length).astype(np.uint16) for length in [1, 0, 7, 40]
    )
    masked = MaskedTokens(mask_id=3, frame=Frame(1, 2))
    how = {"frame": FRAME, "context": CONTEXT, "masked": masked, "batch_tokens": batch_tokens, "keywords": EveryThird()}
    rows = score_documents(bert, documents, **how)
    for row, document in zip(rows, documents, strict=True):
        chosen = masked.chosen(document)
        assert len(chosen) == min(len(document), max(1, round(0.15 * len(document))))
        nll, thirds = 0.0, 0.0
        for start in range(0, len(document), CONTEXT - 2):
            window = np.array([1, *document[start : start + CONTEXT - 2], 2])
            places = [place - start + 1 for place in chosen if start <= place < start + CONTEXT - 2]
            truth = window[places]
            window[places] = 3
            with torch.no_grad():
                each = -bert(torch.from_numpy(window[None])).logits[0].log_softmax(-1)[places, truth].double()
            nll += each.sum().item()
            thirds += each[truth % 3 == 0].sum().item()
        assert row[0] == pytest.approx(nll * len(document) / max(1, len(chosen)), rel=1e-5)
        assert row[1:3].tolist() == [len(document), 3 * len(document)]
        assert row[3] == pytest.approx(thirds, rel=1e-5)
        assert row[4] == (document[chosen] % 3 == 0).sum()


def test_the_tokens_that_are_masked_depend_on_the_document_alone():
    masked, document = MaskedTokens(3, Frame(1, 2)), np.arange(100)
    assert masked.chosen(document).tolist() == masked.chosen(document.astype(np.uint16)).tolist()
    assert masked.chosen(document).tolist() != masked.chosen(document[::-1]).tolist()
    assert len({*masked.chosen(document)}) == 15


def test_documents_are_scored_one_by_one(network, documents):
    rows = score_documents(network, documents, frame=FRAME, context=CONTEXT)
    alone = [score(network, Documents([document]), frame=FRAME, context=CONTEXT) for document in documents]
    assert rows[:, 1:3].tolist() == [[one.tokens, one.bytes] for one in alone]
    assert rows[:, 0] == pytest.approx([one.nll for one in alone], rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [16, 1000])
def test_scores_by_position_in_the_window(network, documents, batch_tokens):
    """A document of 17 tokens has windows that score 8, 8 and 1, the last one at its end."""
    how = {"frame": FRAME, "context": CONTEXT, "batch_tokens": batch_tokens}
    plain, rows = (score_documents(network, documents, **how, positions=at) for at in ((), (0, 4)))
    assert rows.shape == (len(documents), 9)
    assert rows[:, :5] == pytest.approx(plain)
    assert rows[:, [6, 8]].sum(axis=1).tolist() == plain[:, 1].tolist()
    assert rows[:, [5, 7]].sum(axis=1) == pytest.approx(plain[:, 0])
    assert rows[6, [6, 8]].tolist() == [8, 9]
    first = Documents([documents[1][:4]])
    assert rows[1, 5] == pytest.approx(score_documents(network, first, **how)[0, 0], rel=1e-5), (
        "what comes first is as alone"
    )


def test_parts_add_up_to_the_whole():
    whole = Score(math.log(2) * 10, 10, 20) + Score(math.log(8) * 90, 90, 180)
    assert whole.perplexity == pytest.approx(6.96, abs=0.01)
    assert whole.bytes == 200


def test_what_is_tracked_of_a_score():
    score = Score(math.log(8) * 10, 10, 30, math.log(4) * 3, 3)
    assert score.figures("perplexity") == pytest.approx(
        {"perplexity": 8, "bits_per_byte": 1, "keyword_perplexity": 4, "keyword_nll": math.log(4)}
    )
    assert list(Score(1.0, 1, 1).figures("pseudo_perplexity")) == ["pseudo_perplexity", "bits_per_byte"]


def test_nothing_scored_is_not_a_perplexity_of_one():
    assert math.isnan(Score().perplexity)
    assert math.isnan(Score().keyword_perplexity)


def test_what_is_not_a_number_stays_so():
    assert math.isnan(Score(math.nan, 1, 1).perplexity)


def test_an_overflow_is_infinite():
    assert Score(1e6, 1, 1).perplexity == math.inf


def test_the_same_first_documents_for_every_trial(documents):
    assert first_documents(documents, None) == 10
    assert first_documents(documents, 1 + 5 + 7) == 3
    assert first_documents(documents, 1 + 5 + 7 + 7) == 3, "a document that does not fit is left out"
    assert first_documents(documents[1:], 1) == 1, "at least one"


def test_leaves_the_model_training_if_it_was(network, documents):
    network.train()
    score(network, Documents(documents[:1]), frame=FRAME, context=CONTEXT)
    assert network.training
    network.eval()


@pytest.mark.slow
def test_agrees_with_lm_evaluation_harness(tmp_path):
    """Its rolling log-likelihood of each text, from one token to ten windows of the same saved model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    corpus = ["To be, or not to be: that is the question.\n", "naïve ", "a", "\n\n  x = f(y)\n" * 9, "words " * 130]
    made = tokenizer.train(corpus, TrainedTokenizer(vocab_size=300))
    torch.manual_seed(6)
    sizes = {"vocab_size": len(made), "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16}
    ends = {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.3)).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    # Its cache takes windows of the same tokens for one, though it scores fewer of one: 0.3 % off for a word 130 times.
    harness = HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", batch_size=3, logits_cache=False)
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(corpus)]
    expected = [-each for each in harness.loglikelihood_rolling(requests, disable_tqdm=True)]
    trained = checkpoint.load(tmp_path)
    documents = Documents(np.array(trained.tokenizer(text)["input_ids"]) for text in corpus)
    assert (min(map(len, documents)), max(map(len, documents)) > 8 * 16) == (1, True)
    rows = score_documents(trained.model, documents, frame=trained.frame(), context=trained.context)
    assert rows[:, 0] == pytest.approx(expected, rel=1e-4)
