"""python -m raylm.generate MODEL --prompt TEXT: text from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raylm import cli
from raylm.config import dump
from raylm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from raylm.checkpoint import Trained


def generate(
    model: Annotated[str, typer.Argument(help="A checkpoint of raylm, or a Hugging Face model directory.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Text to go on from. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A file with a prompt a line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed draws the same text.")] = 0,
    print_config: cli.PrintConfig = False,
    dry_run: cli.DryRun = False,
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
    from raylm import checkpoint

    directory = checkpoint.check(model)
    if print_config or dry_run:
        experiment = checkpoint.read_experiment(directory)
        if print_config and experiment is not None:
            return cli.Answer(experiment.model_dump(mode="json"), dump(experiment, comments=True).rstrip())
        record = {"model": str(directory), "prompts": texts, "max_new_tokens": max_new_tokens, "seed": seed}
        return cli.Answer(record, "\n".join(f"{name}: {value}" for name, value in record.items()))
    from transformers import GenerationConfig

    from raylm import cluster, loop

    with cli.task("Loading the model"):
        loop.set_up_torch(cluster.cpus_here())
        trained = checkpoint.load(directory)
        trained.model.to(loop.device()).eval()
    sampling = {"temperature": temperature, "top_p": top_p} if temperature > 0 else {}
    if trained.masked is not None:
        answers = [filled(trained, text) for text in texts]
        return cli.Answer({"prompts": texts, "texts": answers}, "\n\n".join(answers))
    how = GenerationConfig(do_sample=temperature > 0, **sampling)
    answers = [text + continuation(trained, text, how, max_new_tokens=max_new_tokens, seed=seed) for text in texts]
    return cli.Answer({"prompts": texts, "texts": answers}, "\n\n".join(answers))


def filled(trained: Trained, prompt: str) -> str:
    """The prompt with each of its mask tokens replaced by the likeliest token there."""
    import torch

    tokenizer = trained.tokenizer
    given = tokenizer(prompt, return_tensors="pt")["input_ids"].to(trained.model.device)
    places = given[0] == tokenizer.mask_token_id
    if not places.any():
        raise ConfigError(f"--prompt {prompt!r}: a masked model fills {tokenizer.mask_token}; put one in", "--prompt")
    with torch.inference_mode():
        given[0, places] = trained.model(input_ids=given).logits[0, places].argmax(-1)
    return tokenizer.decode(given[0], skip_special_tokens=True)


def continuation(trained: Trained, prompt: str, how: GenerationConfig, *, max_new_tokens: int, seed: int) -> str:
    """What the model says after a prompt. Beyond its context it goes on from the last half of what it has said."""
    import torch
    from transformers import set_seed

    tokenizer, network = trained.tokenizer, trained.model
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    set_seed(seed)
    start = tokenizer(prompt or tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids, left = list(start), max_new_tokens
    while left > 0 and (len(ids) == len(start) or ids[-1] != tokenizer.eos_token_id):
        window = ids[-(trained.context // 2) :] if len(ids) >= trained.context else ids
        size = min(left, trained.context - len(window))
        given = torch.tensor([window], device=network.device)
        # "def " ends in a token that no text has before a name; healing lets " name" take its place.
        healing = {"token_healing": True, "tokenizer": tokenizer} if ids == start and prompt else {}
        with torch.inference_mode():
            said = network.generate(
                given,
                generation_config=how,
                attention_mask=torch.ones_like(given),
                max_new_tokens=size,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                **healing,
            )[0].tolist()
        ids = ids[: len(ids) - len(window)] + said
        left -= size
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return text.removeprefix(prompt)


def main() -> None:
    cli.run(generate)


if __name__ == "__main__":
    from raylm.generate import main  # by its real name, so that Ray ships functions by reference

    main()
