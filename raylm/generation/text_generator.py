"""Prompts -> texts, a batch at a time, by transformers' `generate`.

A text begins with its prompt as it was given. Where prompt and text together outgrow the model's context, the model
reads their end:

    context 8    prompt a b c d e f g h i j    reads g h i j    generates k l m n
                                               reads k l m n    generates o p q r

Seed and prompt alone decide a text that is drawn, because each prompt has a random generator of its own. The other
prompts of a batch change the model's scores in their last bits only.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from raylm import checkpoint, model
from raylm.checkpoint import TrainedModel
from raylm.config import ModelConfig
from raylm.generation.settings import WARPERS

if TYPE_CHECKING:
    from raylm.perplexity import MaskedTokens


class Text(NamedTuple):
    text: str
    """The prompt and what was generated; of a masked model, the prompt with its masks filled."""
    tokens: int
    """How many were generated or filled."""


def load(
    directory: str, settings: GenerationConfig | None, seed: int, trusted: bool, cpus: float, use_gpu: bool | None
) -> TextGenerator:
    """The model of a directory, on this process's GPU if it may use one."""
    model.set_up_torch(cpus)
    trained = checkpoint.load(directory, ModelConfig(trust_remote_code=trusted))
    trained.model.to(model.device(use_gpu)).eval()
    return TextGenerator(trained, settings or GenerationConfig(), seed=seed)


class TextGenerator:
    """A model, and how it generates."""

    def __init__(self, trained: TrainedModel, settings: GenerationConfig, *, seed: int):
        self.trained, self.settings, self.seed = trained, settings, seed
        self.tokenizer, self.network = trained.tokenizer, trained.model
        self.tokenizer.pad_token = self.tokenizer.eos_token  # padding is masked, any token will do
        self.network.generation_config = GenerationConfig()  # the settings have what it said
        stops = settings.stop_strings
        self.stop_strings = [StopStringCriteria(self.tokenizer, stops)] if stops else []

    def texts(self, prompts: Sequence[str], show: Callable[[str], None] | None = None) -> list[Text]:
        """The text of each prompt. `show`, with one prompt: called with each part of its text as it is generated."""
        if (masked := self.trained.masked()) is not None:
            return [self._filled(prompt, masked) for prompt in prompts]
        rows = [_Row(self, prompt) for prompt in prompts]
        streamer = None if show is None else _Streamer(rows[0], show)
        is_beam_search = (self.settings.num_beams or 1) > 1  # whose result depends on where a window ends
        for batch in [[row] for row in rows] if is_beam_search else [rows]:
            while unfinished := [row for row in batch if row.remaining]:
                self._extend(unfinished, streamer)
        if streamer is not None:
            streamer.show(rows[0].text())
        return [Text(row.text(), len(row.generated)) for row in rows]

    def _extend(self, rows: list[_Row], streamer: _Streamer | None) -> None:
        """Generate equally many tokens for each row, until one has its text or has filled the model's context."""
        windows = [row.window() for row in rows]
        inputs = self.tokenizer.pad(
            {"input_ids": windows}, padding_side="left", return_attention_mask=True, return_tensors="pt"
        ).to(self.network.device)
        longest = inputs["input_ids"].shape[1]
        size = min(self.trained.context - longest, *(row.remaining for row in rows))
        settings, processors = copy.deepcopy(self.settings), LogitsProcessorList()
        settings.max_new_tokens, settings.stop_strings = size, None
        settings.pad_token_id = self.tokenizer.pad_token_id
        if settings.min_new_tokens is not None:  # all rows that are left have equally many
            settings.min_new_tokens = min(max(0, settings.min_new_tokens - len(rows[0].generated)), size)
        if settings.do_sample:  # the draw comes after the warpers, and transformers puts its own last
            settings.do_sample = False
            for name, warper in WARPERS.items():
                if (value := getattr(settings, name)) is not None:
                    processors.append(warper(value))
                    setattr(settings, name, None)
            processors.append(_Draw([row.random for row in rows]))
        with torch.no_grad():  # not inference_mode: a buffer that a model makes in it could not be trained with
            tokens = self.network.generate(
                **inputs,
                generation_config=settings,
                logits_processor=processors,
                stopping_criteria=self.stop_strings,
                streamer=streamer,
            )
        for row, new in zip(rows, tokens[:, longest:].tolist(), strict=True):
            row.extend(new, size)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _filled(self, prompt: str, masked: MaskedTokens) -> Text:
        """The prompt with the likeliest token in the place of each mask, read in the windows that are scored, too."""
        ids = np.array(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int64)
        filled = ids.copy()
        around = len(masked.frame.around(()))
        room = max(1, self.trained.context - around)
        for start in range(0, len(ids), room):
            window = masked.frame.around(ids[start : start + room])
            places = np.flatnonzero(window == masked.mask_id)
            if len(places):
                with torch.no_grad():
                    logits = self.network(input_ids=torch.from_numpy(window)[None].to(self.network.device)).logits
                filled[start + places - around + 1] = logits[0, places].argmax(-1).cpu()
        return Text(self.decode(filled.tolist()), int(np.count_nonzero(ids == masked.mask_id)))


class _Row:
    """One prompt, and the tokens generated after it."""

    def __init__(self, generator: TextGenerator, prompt: str):
        self.generator, self.prompt = generator, prompt
        # Most tokenizers put the space in front of a word into its token: in a text no token of a space alone stands
        # before a word, and behind one a model could not say " self".
        ids = generator.tokenizer(prompt.removesuffix(" "), add_special_tokens=False)["input_ids"]
        self.spelled = generator.decode(ids)
        """The prompt as the tokenizer spells it: without capitals, for some; without a space at its end."""
        frame = generator.trained.frame()
        self.read = frame.around(ids)[:-1].tolist() or [frame.end]
        """The prompt behind the prefix of the model's documents."""
        self.generated: list[int] = []
        self.remaining: int = generator.settings.max_new_tokens
        """How many tokens may still be generated."""
        self.start = 0
        """Where the window begins that the model reads."""
        seed = hashlib.blake2b(f"{generator.seed} {prompt}".encode("utf-8", "replace"), digest_size=8).digest()
        self.random = torch.Generator(generator.network.device).manual_seed(int.from_bytes(seed, "big"))

    def window(self) -> list[int]:
        """The tokens that the model reads: all of them, or their end, if they fill its context."""
        ids, context = self.read + self.generated, self.generator.trained.context
        if len(ids) - self.start >= context:
            self.start = len(ids) - max(context // 2, context - self.remaining)
        return ids[self.start :]

    def extend(self, tokens: list[int], size: int) -> None:
        """Add tokens that were generated where `size` were asked for; a text ends by a token or by a stop string."""
        ends = self.generator.settings.eos_token_id
        kept = list(itertools.takewhile(lambda token: token not in ends, tokens))
        self.generated += kept
        self.remaining -= size
        ids = torch.tensor([self.read + self.generated], device=self.generator.network.device)
        if len(kept) < size or any(stop(ids, None).item() for stop in self.generator.stop_strings):
            self.remaining = 0

    def text(self, more: Sequence[int] = ()) -> str:
        """The prompt with the text of all tokens generated, and of `more`."""
        generated = [*self.generated, *more]
        # Decoded behind the prompt, because some tokenizers leave out the space of the first word.
        text = self.generator.decode(self.read + generated).removeprefix(self.spelled) if generated else ""
        return self.prompt + (text.removeprefix(" ") if self.prompt.endswith(" ") else text)


class _Draw(LogitsProcessor):
    """Leaves of each row's tokens one, drawn with the row's own random generator."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self.generators = generators

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        rows = zip(scores.softmax(-1), self.generators, strict=True)
        tokens = torch.stack([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
        return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


class _Streamer(BaseStreamer):
    """Shows the text of a row while it is generated.

    transformers' TextStreamer keeps a word back until the next one begins, and leaves out the space between the prompt
    and a first word of WordPiece or SentencePiece.
    """

    def __init__(self, row: _Row, show: Callable[[str], None]):
        self.row, self._show = row, show
        self.tokens: list[int] = []
        """Those that the row does not have yet."""
        self.shown = ""
        self.show(row.prompt)

    def put(self, value: torch.Tensor) -> None:
        if value.dim() == 2:  # the tokens that the model reads
            return
        self.tokens += value.tolist()
        if self.tokens[-1] not in self.row.generator.settings.eos_token_id:
            self.show(self.row.text(self.tokens).rstrip("\ufffd"))  # which stands for a part of a character

    def end(self) -> None:
        self.tokens = []

    def show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self._show(text[len(self.shown) :])
            self.shown = text
