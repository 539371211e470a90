import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from raylm.perplexity import MaskedTokens, Score, Window, first_documents, score, score_documents, windows

CONTEXT = 8
EOS = 0


class Documents(list):
    def document_bytes(self, index):
        return 3 * len(self[index])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    sizes = {"vocab_size": 23, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": CONTEXT}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.5)).eval()


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(2)
    return Documents(random.integers(1, 23, length).astype(np.uint16) for length in [1, 5, 7, 8, 9, 16, 17, 40, 3, 25])


def reference(network, documents, context, stride):
    """Straight from the definition, a token at a time, in float64: (nll, tokens)."""
    precise = GPT2LMHeadModel(network.config).double().eval()
    precise.load_state_dict(network.state_dict())
    nll, tokens = 0.0, 0
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
                tokens += 1
            done = end
    return nll, tokens


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
    nll, tokens = reference(network, documents, CONTEXT, stride)
    found = score(network, documents, eos_id=EOS, context=CONTEXT, stride=stride)
    assert found.tokens == tokens == sum(map(len, documents))
    assert found.nll == pytest.approx(nll, rel=1e-6)
    assert found.bytes == 3 * tokens
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / (3 * tokens), rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 20, 64, 100_000])
def test_does_not_depend_on_the_batch(network, documents, batch_tokens):
    found = score(network, documents, eos_id=EOS, context=CONTEXT, batch_tokens=batch_tokens)
    expected = score(network, documents, eos_id=EOS, context=CONTEXT)
    assert (found.tokens, found.bytes) == (expected.tokens, expected.bytes)
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_a_masked_model_predicts_each_token_from_all_the_others_in_its_window(batch_tokens):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertForMaskedLM(BertConfig(vocab_size=23, max_position_embeddings=CONTEXT, **sizes)).eval()
    documents = Documents(np.random.default_rng(4).integers(4, 23, length) for length in [1, 6, 7, 15])
    expected = []
    for document in documents:
        nll = 0.0
        for start in range(0, len(document), CONTEXT - 2):
            window = [1, *document[start : start + CONTEXT - 2].tolist(), 2]
            for place in range(1, len(window) - 1):
                shown = torch.tensor([[*window[:place], 3, *window[place + 1 :]]])
                with torch.no_grad():
                    nll -= bert(shown).logits[0, place].log_softmax(-1)[window[place]].item()
        expected.append(nll)
    masked = MaskedTokens(mask_id=3, first_id=1, last_id=2)
    how = {"eos_id": EOS, "context": CONTEXT, "masked": masked, "batch_tokens": batch_tokens}
    rows = score_documents(bert, documents, **how)
    assert rows[:, 0] == pytest.approx(expected, rel=1e-5)
    assert rows[:, 1].tolist() == [1, 6, 7, 15]


def test_documents_are_scored_one_by_one(network, documents):
    rows = score_documents(network, documents, eos_id=EOS, context=CONTEXT)
    alone = [score(network, Documents([document]), eos_id=EOS, context=CONTEXT) for document in documents]
    assert rows[:, 1:].tolist() == [[one.tokens, one.bytes] for one in alone]
    assert rows[:, 0] == pytest.approx([one.nll for one in alone], rel=1e-6)


def test_parts_add_up_to_the_whole():
    whole = Score(math.log(2) * 10, 10, 20) + Score(math.log(8) * 90, 90, 180)
    assert whole.perplexity == pytest.approx(6.96, abs=0.01)
    assert whole.bytes == 200


def test_nothing_scored_is_not_a_perplexity_of_one():
    assert math.isnan(Score().perplexity)


def test_an_overflow_is_infinite():
    assert Score(1e6, 1, 1).perplexity == math.inf


def test_the_same_first_documents_for_every_trial(documents):
    assert first_documents(documents, None) == 10
    assert first_documents(documents, 1 + 5 + 7) == 3
    assert first_documents(documents, 1 + 5 + 7 + 7) == 3, "a document that does not fit is left out"
    assert first_documents(documents[1:], 1) == 1, "at least one"


def test_leaves_the_model_training_if_it_was(network, documents):
    network.train()
    score(network, Documents(documents[:1]), eos_id=EOS, context=CONTEXT)
    assert network.training
    network.eval()
