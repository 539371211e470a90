"""Prompt -> text, many at a time.

A prompt's last token is made again, out of the tokens that begin with its text ("healing"): in `def ` the space is a
token that no text has before a name, and " name" may take its place.

    prompt   d e f        c, ca, cat and car are tokens
    reads    d e          makes c, ca, cat or car, whichever is likely there, then goes on
    text     d e f ...    always begins with the prompt as it was given

Where a text outgrows the context of the model, it goes on from the last half of it.

A drawn text depends on the seed and the prompt alone: each has random numbers of its own, one a token. Other prompts of
its batch change the model's figures in their last bits, and so a text only where two tokens are equal up to these.
"""

from __future__ import annotations

import bisect
import copy
import hashlib
import itertools
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from raylm import checkpoint, model
from raylm.checkpoint import TrainedModel
from raylm.config import ModelConfig

if TYPE_CHECKING:
    from raylm.perplexity import MaskedTokens


class Text(NamedTuple):
    text: str
    """The prompt with what was added; of a masked model, the prompt with its masks filled."""
    tokens: int
    """How many were added or filled."""


def identity(prompt: str) -> int:
    """64 bits of blake2b, by which a prompt is known: the `hash` of a corpus document."""
    return int.from_bytes(hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def load(
    directory: str, how: GenerationConfig | None, seed: int, trusted: bool, cpus: float, use_gpu: bool | None
) -> TextGenerator:
    """The model of a directory, on this process's GPU if it may use one."""
    model.set_up_torch(cpus)
    trained = checkpoint.load(directory, ModelConfig(trust_remote_code=trusted))
    trained.model.to(model.device(use_gpu)).eval()
    return TextGenerator(trained, how or GenerationConfig(), seed=seed)


class TextGenerator:
    """A model and how it writes."""

    def __init__(self, trained: TrainedModel, how: GenerationConfig, *, seed: int):
        self.trained, self.how, self.seed = trained, how, seed
        self.tokenizer, self.network = trained.tokenizer, trained.model
        self.network.generation_config = GenerationConfig()  # what it said is in `how`

    def texts(self, prompts: Sequence[str], show: Callable[[str], None] | None = None) -> list[Text]:
        """The text of each prompt. `show`, with one prompt: called with each piece of its text when it is made."""
        if (masked := self.trained.masked()) is not None:
            return [self._filled(prompt, masked) for prompt in prompts]
        rows = [_Row(self, prompt) for prompt in prompts]
        for batch in self._batches(rows):
            stream = _Stream(batch[0], show) if show is not None else None
            made = 0
            while left := [row for row in batch if row.left]:
                made += self._write(left, made, stream)
            if stream is not None:
                stream.finish()
        return [Text(row.text(row.ids), row.added) for row in rows]

    def _batches(self, rows: list[_Row]) -> list[list[_Row]]:
        """Rows that can be written side by side: each text is the same as when it is alone."""
        if (self.how.num_beams or 1) > 1 or self.how.guidance_scale is not None:  # these begin anew with each window
            return [[row] for row in rows]
        return [part for part in ([row for row in rows if row.healed == healed] for healed in (0, 1)) if part]

    def _write(self, rows: list[_Row], made: int, stream: _Stream | None) -> int:
        """Let rows that have `made` tokens make more, until one of them has filled the context. How many."""
        windows = [row.window() for row in rows]
        longest = max(len(window) for window in windows)
        size = min(self.trained.context - longest, *(row.left for row in rows))
        given = torch.full((len(rows), longest), self.tokenizer.eos_token_id)
        mask = torch.zeros_like(given)
        for number, window in enumerate(windows):  # padding is on the left: the next token follows the last one
            given[number, longest - len(window) :] = torch.tensor(window)
            mask[number, longest - len(window) :] = 1
        beams = (self.how.num_beams or 1) > 1
        processors: list[LogitsProcessor] = [_Heal(rows, longest)] if made == 0 else []
        stops = [_Stop(rows, longest)] if self.how.stop_strings else []
        with torch.inference_mode(), torch.random.fork_rng(enabled=beams):
            if beams:  # drawn with torch's one generator
                torch.manual_seed(int(rows[0].numbers[made] * 2**53))
            said = self.network.generate(
                given.to(self.network.device),
                attention_mask=mask.to(self.network.device),
                generation_config=self._config(size, made, rows),
                logits_processor=LogitsProcessorList(processors),
                stopping_criteria=StoppingCriteriaList(stops),
                custom_generate=None if beams else self._sampled(rows, made, stream),
            )[:, longest:].tolist()
        for row, new in zip(rows, said, strict=True):
            row.add(new, size)
        return size

    def _config(self, size: int, made: int, rows: list[_Row]) -> GenerationConfig:
        """The settings for the next `size` tokens, of those that count tokens from the prompt."""
        how = copy.deepcopy(self.how)
        done = made - rows[0].healed
        how.max_new_tokens, how.stop_strings, how.pad_token_id = size, None, self.tokenizer.eos_token_id
        if how.min_new_tokens is not None:
            how.min_new_tokens = min(max(0, how.min_new_tokens - done), size)
        if how.exponential_decay_length_penalty is not None:
            start, factor = how.exponential_decay_length_penalty
            how.exponential_decay_length_penalty = (start - done, factor)
        return how

    def _sampled(self, rows: list[_Row], made: int, stream: _Stream | None) -> Callable[..., Any]:
        """transformers' decoding loop, with a drawing of its own as the last processor, and with the streamer."""

        def decode(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, **rest: Any) -> Any:
            if self.how.do_sample:
                numbers = np.stack([row.numbers[made:] for row in rows])
                logits_processor.append(_Draw(numbers, input_ids.shape[1]))
            return type(model)._sample(model, input_ids, logits_processor, stopping_criteria, streamer=stream, **rest)

        return decode

    @cached_property
    def pieces(self) -> list[tuple[str, int]]:
        """The vocabulary but its special tokens, in the order of the letters."""
        special = {*self.tokenizer.all_special_ids, *self.how.eos_token_id}
        vocabulary = self.tokenizer.get_vocab().items()
        # <0x0A> of Llama's is a byte, not the text that it looks like.
        return sorted(
            (piece, token)
            for piece, token in vocabulary
            if token not in special and not re.fullmatch("<0x[0-9A-F]{2}>", piece)
        )

    def beginning_with(self, token: int) -> list[int]:
        """The tokens that begin with the letters of one; itself among them."""
        piece = self.tokenizer.convert_ids_to_tokens(token)
        first = bisect.bisect_left(self.pieces, (piece, -1))
        rest = itertools.islice(self.pieces, first, None)
        return [found for _, found in itertools.takewhile(lambda pair: pair[0].startswith(piece), rest)] or [token]

    def decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _filled(self, prompt: str, masked: MaskedTokens) -> Text:
        """The prompt with the likeliest token in the place of each mask, read in the windows that scores are of."""
        ids = np.array(self.tokenizer(prompt, add_special_tokens=False)["input_ids"], np.int64)
        filled = ids.copy()
        around = len(masked.frame.around(()))
        room = max(1, self.trained.context - around)
        for start in range(0, len(ids), room):
            window = masked.frame.around(ids[start : start + room])
            places = np.flatnonzero(window == masked.mask_id)
            if len(places):
                with torch.inference_mode():
                    logits = self.network(input_ids=torch.from_numpy(window)[None].to(self.network.device)).logits
                filled[start + places - around + 1] = logits[0, places].argmax(-1).cpu()
        return Text(self.decoded(filled.tolist()), int(np.count_nonzero(ids == masked.mask_id)))


class _Row:
    """One prompt on its way to a text."""

    def __init__(self, writer: TextGenerator, prompt: str):
        tokenizer = writer.tokenizer
        self.writer, self.prompt = writer, prompt
        ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        self.spelled = writer.decoded(ids)
        """The prompt as the tokenizer spells it: without capitals, for some."""
        self.allowed: list[int] | None = None
        """The tokens that may stand in the place of the prompt's last."""
        self.last: int | None = None
        self.healed = 0
        if ids and ids[-1] not in (*tokenizer.all_special_ids, *writer.how.eos_token_id):
            self.last, self.healed = ids.pop(), 1
            self.allowed = writer.beginning_with(self.last) if self.spelled == prompt else [self.last]
        frame = writer.trained.frame()
        self.ids = [*frame.around(ids)[:-1].tolist()] or [frame.end]
        """All tokens, those of the prompt and those made, behind the prefix that the model's documents have."""
        self.left = writer.how.max_new_tokens + self.healed
        context = writer.trained.context
        self.start = len(self.ids) - max(context // 2, context - self.left) if len(self.ids) >= context else 0
        """Where the window begins that the model reads."""
        self.numbers = np.random.default_rng((writer.seed, identity(prompt))).random(writer.how.max_new_tokens + 2)
        self.added = -self.healed

    def window(self) -> list[int]:
        """The tokens that the model reads; once they fill its context, the last half of them."""
        context = self.writer.trained.context
        if len(self.ids) - self.start >= context:
            self.start = len(self.ids) - context // 2
        return self.ids[self.start :]

    def add(self, new: list[int], size: int) -> None:
        """Tokens that were made where `size` were asked for; they end with the text."""
        stops = self.writer.how.eos_token_id
        kept = list(itertools.takewhile(lambda token: token not in stops, new))
        self.ids += kept
        self.added += len(kept)
        self.left -= size
        if len(kept) < size or self.stopped(self.ids):
            self.left = 0

    def text(self, ids: list[int]) -> str:
        """The prompt with what these tokens say after it."""
        if self.added == -self.healed and ids is self.ids:
            return self.prompt
        text = self.writer.decoded(ids)
        more = text[len(os.path.commonprefix([self.spelled, text])) :]  # noqa: RUF071 - characters are meant
        # Some tokenizers have no token for the space at the end of a prompt.
        return self.prompt + (more.removeprefix(" ") if self.prompt[len(self.spelled) :].isspace() else more)

    def stopped(self, ids: list[int]) -> bool:
        """Whether what was added, with the end of the prompt, has one of the texts that stop it."""
        stops = self.writer.how.stop_strings or []
        text = self.text(ids)
        return any(
            stop in text[max(0, len(self.prompt) - len(stop) + 1) :]
            for stop in ([stops] if isinstance(stops, str) else stops)
        )


class _Heal(LogitsProcessor):
    """The first token made begins with the letters of the prompt's last one."""

    def __init__(self, rows: list[_Row], start: int):
        self.rows, self.start = rows, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] > self.start:
            return scores
        healed = torch.full_like(scores, -torch.inf)
        for number in range(len(scores)):
            row = self.rows[number * len(self.rows) // len(scores)]  # with beams, several scores a row
            allowed = slice(None) if row.allowed is None else row.allowed
            healed[number, allowed] = scores[number, allowed]
            if healed[number].max() == -torch.inf:  # all are forbidden, where a prompt may not be repeated for example
                healed[number, row.last] = 0.0
        return healed


class _Draw(LogitsProcessor):
    """The last processor: leaves of each row's tokens the one that its next random number stands for."""

    def __init__(self, numbers: np.ndarray, start: int):
        self.numbers, self.start = torch.from_numpy(numbers), start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.start
        sums = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
        number = self.numbers[:, step : step + 1].to(scores.device)
        token = torch.searchsorted(sums, number * sums[:, -1:], right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _Stop(StoppingCriteria):
    """Texts that have one of the stop strings are ended."""

    def __init__(self, rows: list[_Row], start: int):
        self.rows, self.start = rows, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, self.start :].tolist()
        rows = [self.rows[number * len(self.rows) // len(new)] for number in range(len(new))]
        ended = [row.stopped([*row.ids, *ids]) for row, ids in zip(rows, new, strict=True)]
        return torch.tensor(ended, device=input_ids.device)


class _Stream(BaseStreamer):
    """Shows a text while it is made: what no later token can change."""

    def __init__(self, row: _Row, show: Callable[[str], None]):
        self.row, self.show = row, show
        self.new: list[int] = []
        """Tokens that the row does not have yet."""
        self.shown = ""
        self._show(row.prompt)

    def put(self, value: torch.Tensor) -> None:
        self.new += value.flatten().tolist()
        if self.new[-1] not in self.row.writer.how.eos_token_id:
            self._show(self.row.text([*self.row.ids, *self.new]).rstrip("\ufffd"))  # part of a character

    def end(self) -> None:
        self.new = []

    def finish(self) -> None:
        self._show(self.row.text(self.row.ids))

    def _show(self, text: str) -> None:
        if text.startswith(self.shown) and text != self.shown:
            self.show(text[len(self.shown) :])
            self.shown = text
