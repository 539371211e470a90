"""Does raylm scale predict a larger training on a real text? python benchmarks/real_text.py DIRECTORY

The text is 3,794 conversations of people in English, 13 MB (chitchat-dataset 0.9.0, MIT). Llamas of three widths are
trained for 2, 4 and 8 million tokens each, with model.transfer and one learning rate; the law of these nine predicts a
fourth of four times the largest one's floating-point operations, which is then trained, too. 20 minutes on 2 cores; all
of it is in DIRECTORY, and the same command resumes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from raylm import api

PACKAGE = "chitchat-dataset==0.9.0"
FEWEST_CHARACTERS = 200

HEAD = 16
WIDTHS = (16, 32, 64)
BUDGETS = (8e6, 4e6, 2e6)
"""The longest first, so that two trials at a time end together."""

WIDTH, BUDGET = 112, 12_200_000
"""Of the training that is predicted."""

NAME = "model.config."
SETTINGS: dict[str, Any] = {
    "tokenizer.train": {"vocab_size": 512},
    "blocks.block_size": 64,
    "corpus.validation_fraction": 0.05,
    "train.learning_rate": 1.5e-2,
    "train.eval_every_tokens": 10**9,  # at the end alone
    "eval.max_tokens": 200_000,
    "cluster.cpus_per_worker": 1,
    "tracking.uri": None,
}


def main() -> None:
    place = Path(sys.argv[1]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    text = conversations(place / "conversations.jsonl")
    sweeps = [api.tune(experiment(place, text, width)) for width in reversed(WIDTHS)]
    asked = {f"{NAME}hidden_size": WIDTH, f"{NAME}num_attention_heads": WIDTH // HEAD}
    directories = [next(place.glob(f"runs/*/{each.sweep}")) for each in sweeps]
    scaling = api.scale(*directories, to=asked, tokens=BUDGET)
    predicted = scaling.prediction
    assert predicted is not None, "it was asked about"
    law, low_high = scaling.fits["parameters"].law, [math.exp(each) for each in predicted.loss]
    print(", ".join(f"{name} {value:.3g}" for name, value in law._asdict().items()), end="; ")
    print(f"noise of a run {scaling.fits['parameters'].noise:.2%}")
    print(f"predicted {low_high[0]:.2f} [{low_high[1]:.2f}, {low_high[2]:.2f}]")
    # The command's settings, without the file that it starts from.
    words = [word for word in predicted.command.split() if "=" in word]
    fourth = {key: json.loads(value) for key, _, value in (word.partition("=") for word in words)}
    whole = {"cluster.cpus_per_worker": 2, "tune.ladder": {}, "name": "fourth", **fourth}
    found = api.train(experiment(place, text, WIDTH, **whole)).last_perplexity
    assert found is not None, "it is scored at its end"
    print(f"measured {found:.2f}, {found / low_high[0] - 1:+.1%}; {predicted.times_the_largest:.2f} times the FLOPs")


def conversations(file: Path) -> Path:
    """The text, a document for each conversation, a line for each message, each turn behind a dash."""
    if file.exists():
        return file
    with tempfile.TemporaryDirectory() as fetched:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", fetched, PACKAGE], check=True)
        (wheel,) = Path(fetched).glob("*.whl")
        found = json.loads(zipfile.ZipFile(wheel).read("chitchat_dataset/dataset.json"))
    turns = (["\n".join(each["text"] for each in turn) for turn in one["messages"]] for one in found.values())
    texts = dict.fromkeys("\n".join(f"- {turn}" for turn in each) for each in turns)
    with file.open("w", encoding="utf-8") as written:
        for each in texts:
            if len(each) >= FEWEST_CHARACTERS:
                written.write(json.dumps({"text": each}) + "\n")
    return file


def experiment(place: Path, text: Path, width: int, **more: Any) -> Any:
    """A sweep of one width over all budgets: in one ladder with others it would have their tokens a parameter."""
    heads = width // HEAD
    config = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": 3 * width,
        "tie_word_embeddings": True,
    }
    parameters = 512 * width + 2 * (4 * width**2 + 3 * width * 3 * width + 2 * width) + width
    ladder = {
        f"{NAME}num_hidden_layers": [2],
        f"{NAME}hidden_size": [width],
        f"{NAME}num_attention_heads": [heads],
        "tokens_per_parameter": [round(budget / parameters, 1) for budget in BUDGETS],
    }
    own = {
        "name": f"width-{width}",
        "storage": str(place / "runs"),
        "corpus.paths": [str(text)],
        "model.config": config,
        "model.transfer": {"base": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}},
        "tune.ladder": ladder,
        "tune.num_samples": 1,
        "tune.scheduler": "none",
        "tune.max_concurrent_trials": 2,
    }
    return api.load({}, **{**SETTINGS, **own, **more})


if __name__ == "__main__":
    main()
