"""A model as it is run to be scored: in the precision of eval.precision, and never with whole logits.

    token ids -> hidden states -> those of the scored tokens -> logits of a few of them at a time -> their nll

So what an evaluation holds does not grow with the vocabulary: the logits of 8,192 tokens of Gemma 3 alone are 8.6 GB.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS = 2**24
"""Logits held at a time: 64 MB in float32, and as much again for their logarithms."""


@contextlib.contextmanager
def scoring(network: PreTrainedModel, precision: str = "float32") -> Iterator[Callable[..., torch.Tensor]]:
    """nll(places, targets, **inputs), while this lasts: of the outputs at `places`, in nats, float64.

    `places`: (rows, columns) of the outputs that are scored, `targets`: the token that each is to predict, both of as
    many elements as the result. Whatever a model is trained in changes nothing: autocast, TF32, weights of half
    precision and attention for those alone are put aside, and are as before afterwards.
    """
    was_training = network.training
    network.eval()
    before = network.__dict__.get("forward")  # mixed precision's, or that of objective.attach
    try:
        with torch.no_grad(), _without_tf32(), _float32_weights(network), _plain_attention(network):
            yield _Nll(network, precision)
    finally:
        network.__dict__.pop("forward", None)
        if before is not None:
            network.forward = before
        network.train(was_training)


class _Nll:
    def __init__(self, network: PreTrainedModel, precision: str):
        self.network, self.precision = network, precision
        self.at_a_time = 1
        """Outputs whose logits are held."""
        # By way of its __call__, where sharded weights are gathered; the class's own forward does the rest.
        network.forward = MethodType(lambda _, call: call(), network)
        parts = (network.base_model, network.get_decoder())  # OPT calls the decoder in its base model
        self.base: torch.nn.Module | None = next(filter(self._gives_hidden_states, parts), None)

    def __call__(self, places: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, **inputs: Any) -> torch.Tensor:
        device = next(self.network.parameters()).device
        inputs = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
        }
        places = places[0].to(device), places[1].to(device)
        return self._run(lambda: self._nll(places, targets.to(device), inputs))

    def _run(self, call: Callable[[], Any]) -> Any:
        kind = next(self.network.parameters()).device.type
        dtype = torch.bfloat16 if self.precision == "float32" else getattr(torch, self.precision)
        with torch.autocast(kind, dtype, enabled=self.precision != "float32"):
            return self.network(call)

    def _nll(self, places: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, inputs: Any) -> torch.Tensor:
        if self.base is None:
            chosen = self._forward(**inputs).logits[places]
            return F.cross_entropy(chosen.float(), targets, reduction="none").double()
        hidden, kind = self._hidden(self.base, inputs)
        found = []
        for states, expected in zip(hidden[places].split(self.at_a_time), targets.split(self.at_a_time), strict=True):
            logits = self._logits(self.base, states, kind)
            found.append(F.cross_entropy(logits.float(), expected, reduction="none").double())
        return torch.cat(found)

    def _forward(self, **inputs: Any) -> Any:
        return type(self.network).forward(self.network, **inputs)

    def _hidden(self, base: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, type]:
        """(hidden states, of shape (rows, columns, features); the class of what the base model returns)"""
        found: list[Any] = []

        def keep(_module: Any, _inputs: Any, outputs: Any) -> Any:
            found.append(outputs)
            return type(outputs)(last_hidden_state=outputs[0][:1, :1])  # of which there are to be logits, here

        hook = base.register_forward_hook(keep)
        try:
            self._forward(**inputs)
        finally:
            hook.remove()
        (outputs,) = found
        return outputs[0], type(outputs)

    def _logits(self, base: torch.nn.Module, hidden: torch.Tensor, kind: type) -> torch.Tensor:
        """What the model makes of hidden states, of shape (tokens, features): head, and caps or scales of logits."""
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
        """Whether the logits of some of a part's hidden states are the model's own, found out on ten tokens.

        Not so where a head looks at several tokens at once, or the part is not the one that the model calls.
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
            except Exception:  # whatever the code of a model says to what it was not made for
                return False
            expected = whole.flatten(0, 1)[3:7]
            most = 1e-2 * expected.abs().max().item()  # not a number if the model has diverged
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
    """Have GPUs multiply float32 with 10 bits of their mantissas, or with all; convolutions, too, whose default is 10.

    Not by transformers' enable_tf32 (5.23), which has a cache: the second time in a process it does nothing.
    """
    torch.backends.fp32_precision = "tf32" if on else "ieee"


@contextlib.contextmanager
def _float32_weights(network: torch.nn.Module) -> Iterator[None]:
    """Weights of half precision in float32, as copies: the parameters are what an optimizer and DDP hold on to.

    Sharded ones stay; training.sharding gathers them in float32.
    """
    copies: dict[int, torch.Tensor] = {}  # tied weights are one
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
    """Attention that takes float32, where that of the training does not: flash attention."""
    before = network.config._attn_implementation
    if "flash" not in str(before):
        yield
        return
    network.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        network.config._attn_implementation = before
