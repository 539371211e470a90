import numpy as np
import pytest

from raylm import tokenizer
from raylm.config import TokenizerConfig, TrainedTokenizer
from raylm.errors import ConfigError, DataError

TEXTS = ["def hello(name):\n    return f'hello {name}'\n", "for name in names:\n    hello(name)\n"] * 20


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
    ids = tokenizer.encoder(str(trained))(texts)
    loaded = tokenizer.load(trained)
    assert [row.tolist() for row in ids] == [loaded(text, add_special_tokens=False).input_ids for text in texts]
    assert ids[0].dtype == np.uint16


def test_a_tokenizer_without_end_of_text_is_refused_with_the_way_out(trained):
    config = (trained / "tokenizer_config.json").read_text()
    (trained / "tokenizer_config.json").write_text(config.replace('"eos_token"', '"not_eos_token"'))
    with pytest.raises(DataError, match=r"no end-of-text token.*eos_token"):
        tokenizer.load(trained)


def test_no_tokenizer_at_a_path(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.path: .*no tokenizer found"):
        tokenizer.load(tmp_path)


def test_the_models_own_tokenizer_is_the_default():
    assert tokenizer.chosen(TokenizerConfig(), "some/model").path == "some/model"
    assert tokenizer.chosen(TokenizerConfig(path="mine"), "some/model").path == "mine"
    with pytest.raises(ConfigError, match=r"tokenizer\.path or tokenizer\.train"):
        tokenizer.chosen(TokenizerConfig(), None)
