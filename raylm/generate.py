"""python -m raylm.generate MODEL --prompt TEXT: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raylm import cli
from raylm.errors import ConfigError


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens up to this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    json: cli.Json = False,
) -> cli.Answer:
    """Let a model go on from prompts."""
    texts = [*(prompt or [])]
    if prompts is not None:
        try:
            texts += prompts.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {prompts}: {error}", where="--prompts") from None
    if not texts:
        raise ConfigError("nothing to go on from; give --prompt TEXT or --prompts FILE", where="--prompt")
    import torch
    from transformers import set_seed

    from raylm import checkpoint, cluster, loop

    checkpoint.check(model)
    with cli.task("Loading the model"):
        loop.set_up_torch(cluster.cpus_here())
        trained = checkpoint.load(model)
        network = trained.model.to(loop.device()).eval()
    answers = []
    for text in texts:
        set_seed(seed)
        ids = trained.tokenizer(text or trained.tokenizer.eos_token, return_tensors="pt", add_special_tokens=False)
        ids = ids["input_ids"][:, -max(1, trained.context - max_new_tokens) :].to(network.device)
        with torch.inference_mode():
            out = network.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(max_new_tokens, max(1, trained.context - ids.shape[1])),
                do_sample=temperature > 0,
                temperature=temperature or None,
                top_p=top_p if temperature > 0 else None,
                pad_token_id=trained.tokenizer.eos_token_id,
            )
        answers.append(text + trained.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return cli.Answer({"prompts": texts, "texts": answers}, "\n\n".join(answers))


def main() -> None:
    cli.run(generate)


if __name__ == "__main__":
    from raylm.generate import main  # by its real name, so that Ray ships functions by reference

    main()
