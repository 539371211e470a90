"""A model set up for scoring: in eval.precision, and without whole logits.

token ids -> hidden states -> those of the scored tokens -> logits of a few of them at a time -> their nll

The memory of an evaluation does not grow with the vocabulary: logits of 8,192 tokens of Gemma 3 would take 8.6 GB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**24
"""Logits held at a time: 64 MB in float32, and the same for their logarithms."""


Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Float32 logits of shape (tokens, vocabulary) and the token that each predicts -> float64 with a row for each."""


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each target, in nats."""
    return F.cross_entropy(logits, targets, reduction="none").double()


def nll_and_misses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of each target, and whether another token is likelier; of shape (tokens, 2)."""
    return torch.stack([nll(logits, targets), logits.argmax(-1) != targets], dim=-1)


@contextlib.contextmanager
def scoring(
    network: PreTrainedModel, precision: str = "float32", measure: Measure = nll
) -> Iterator[Callable[..., torch.Tensor]]:
    """A context with a function score(places, targets, **inputs): what `measure` gives of the outputs at `places`.

    `places`: (rows, columns) of the scored outputs; `targets`: the token that each predicts; the result has as many
    rows. The precision of training has no effect: autocast, TF32, half-precision weights and attention for them
    alone are suspended, and restored afterwards.
    """
    with undisturbed(network):
        yield _Scorer(network, precision, measure)


@contextlib.contextmanager
def undisturbed(network: PreTrainedModel) -> Iterator[None]:
    """A context in which a model, also one in training, computes what its weights give in float32: without dropout,
    gradients, autocast, TF32 or another forward than its class's own. Everything is restored afterwards."""
    was_training = network.training
    network.eval()
    before = network.__dict__.pop("forward", None)  # that of mixed precision or of objective.attach
    try:
        with torch.no_grad(), _without_tf32(), _float32_weights(network), _plain_attention(network):
            yield
    finally:
        network.__dict__.pop("forward", None)
        if before is not None:
            network.forward = before
        network.train(was_training)


class _Scorer:
    def __init__(self, network: PreTrainedModel, precision: str, measure: Measure):
        self.network, self.precision, self.measure = network, precision, measure
        self.at_a_time = 1
        """Outputs whose logits are held."""
        # Called through __call__, which gathers sharded weights; the class's own forward does the rest.
        network.forward = MethodType(lambda _, call: call(), network)
        parts = (network.base_model, network.get_decoder())  # OPT calls the decoder in its base model
        self.base: torch.nn.Module | None = next(filter(self._gives_hidden_states, parts), None)

    def __call__(self, places: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, **inputs: Any) -> torch.Tensor:
        device = next(self.network.parameters()).device
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        places = places[0].to(device), places[1].to(device)
        return self._run(lambda: self._measured(places, targets.to(device), inputs))

    def _run(self, call: Callable[[], Any]) -> Any:
        kind = next(self.network.parameters()).device.type
        dtype = torch.bfloat16 if self.precision == "float32" else getattr(torch, self.precision)
        with torch.autocast(kind, dtype, enabled=self.precision != "float32"):
            return self.network(call)

    def _measured(self, places: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, inputs: Any) -> torch.Tensor:
        if self.base is None:
            chosen = self._forward(**inputs).logits[places]
            return self.measure(chosen.float(), targets)
        hidden, kind = self._hidden(self.base, inputs)
        found = []
        for states, expected in zip(hidden[places].split(self.at_a_time), targets.split(self.at_a_time), strict=True):
            logits = self._logits(self.base, states, kind)
            found.append(self.measure(logits.float(), expected))
        return torch.cat(found)

    def _forward(self, **inputs: Any) -> Any:
        return type(self.network).forward(self.network, **inputs)

    def _hidden(self, base: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, type]:
        """(hidden states, of shape (rows, columns, features); the class of what the base model returns)"""
        found: list[Any] = []

        def keep(_module: Any, _inputs: Any, outputs: Any) -> Any:
            found.append(outputs)
            return type(outputs)(last_hidden_state=outputs[0][:1, :1])  # only one token's logits are computed

        hook = base.register_forward_hook(keep)
        try:
            self._forward(**inputs)
        finally:
            hook.remove()
        (outputs,) = found
        return outputs[0], type(outputs)

    def _logits(self, base: torch.nn.Module, hidden: torch.Tensor, kind: type) -> torch.Tensor:
        """The model's logits of hidden states of shape (tokens, features): the head, and caps or scales."""
        before = base.__dict__.get("forward")
        base.forward = lambda *_, **__: kind(last_hidden_state=hidden[None])
        try:
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            return self._forward(input_ids=ids).logits[0]
        finally:
            del base.forward
            if before is not None:
                base.forward = before

    def _gives_hidden_states(self, base: torch.nn.Module | None) -> bool:
        """Whether the logits of some hidden states are the model's own, checked on ten tokens.

        They are not if the head reads several tokens at once, or if the model does not call this part.
        """
        if base is None or base is self.network:
            return False
        vocab_size = self.network.config.get_text_config().vocab_size
        ids = torch.arange(10, device=next(self.network.parameters()).device).view(2, 5) % vocab_size

        def compared() -> bool:
            whole = self._forward(input_ids=ids).logits
            self.at_a_time = max(1, LOGITS // whole.shape[-1])
            try:
                hidden, kind = self._hidden(base, {"input_ids": ids})
                some = self._logits(base, hidden.flatten(0, 1)[3:7], kind)
            except Exception:  # any error of a model's code for unexpected input
                return False
            expected = whole.flatten(0, 1)[3:7]
            most = 1e-2 * expected.abs().max().item()  # NaN if the model has diverged
            return some.shape == expected.shape and not ((some - expected).abs() > most).any().item()

        return self._run(compared)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    before = torch.backends.fp32_precision
    if torch.cuda.is_available():
        set_tf32(False)
    try:
        yield
    finally:
        torch.backends.fp32_precision = before


def set_tf32(on: bool) -> None:
    """Let GPUs multiply float32 with 10 bits of the mantissa (TF32, the default of convolutions), or with all.

    transformers' enable_tf32 (5.23) is cached, so a second call in a process does nothing.
    """
    torch.backends.fp32_precision = "tf32" if on else "ieee"


@contextlib.contextmanager
def _float32_weights(network: torch.nn.Module) -> Iterator[None]:
    """Use float32 copies of half-precision weights. The parameters stay, because the optimizer and DDP refer to them.

    Sharded weights are not copied; loop.sharding gathers them in float32.
    """
    from torch.distributed.tensor import DTensor  # 0.4 s, which no command needs that only plans

    copies: dict[int, torch.Tensor] = {}  # tied weights are one tensor
    replaced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    try:
        for module in network.modules():
            for own in (module._parameters, module._buffers):
                for name, weight in own.items():
                    if weight is None or isinstance(weight, DTensor):
                        continue
                    if weight.dtype not in (torch.bfloat16, torch.float16):
                        continue
                    if id(weight) not in copies:
                        copies[id(weight)] = torch.nn.Parameter(weight.float(), requires_grad=False)
                    replaced.append((own, name, weight))
                    own[name] = copies[id(weight)]
        yield
    finally:
        for own, name, weight in replaced:
            own[name] = weight


@contextlib.contextmanager
def _plain_attention(network: PreTrainedModel) -> Iterator[None]:
    """Attention that supports float32, in place of flash attention."""
    before = network.config._attn_implementation
    if "flash" not in str(before):
        yield
        return
    network.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        network.config._attn_implementation = before
