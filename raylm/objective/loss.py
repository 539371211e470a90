"""The summed cross entropy of a batch, without holding (batch x block x vocabulary) logits if that is cheaper."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from raylm.blocks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attach(network: PreTrainedModel, *, shifted: bool, smoothing: float = 0.0) -> None:
    """Make the model's own forward return {"loss": summed cross entropy, in nats} if it gets labels.

    `shifted`: the output at a token predicts the next one. `weights`, of shape (rows,), multiply each token's.
    In training the load-balancing loss of a mixture of experts that has one (output_router_logits) is added, by the
    model's own coefficient and once for each token: divided by their number, it is what transformers adds to a mean.
    This is inside of forward because DDP, mixed precision and torch.compile wrap forward only.
    """
    plain = network.forward
    head = network.get_output_embeddings()
    if isinstance(head, torch.nn.Linear):
        _can_be_left_out(head)
    else:
        head = None
    # No key-value cache: it serves generation, and hides where isolated documents start.
    options = {"use_cache": False} if shifted else {}

    def forward(
        self: PreTrainedModel, *args: Any, labels: Any = None, weights: Any = None, **kwargs: Any
    ) -> dict[str, torch.Tensor] | Any:
        if labels is None:
            return plain(*args, **kwargs)
        kwargs |= options
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED) if shifted else labels
        weight = bias = None
        if head is not None and head.makes_logits is None:
            head.makes_logits = _makes_logits(network, head, plain)
        if head is None or not head.makes_logits:
            found = plain(*args, **kwargs)
        else:
            head.left_out = True
            try:
                found = plain(*args, **kwargs)
            finally:
                head.left_out = False
            weight, bias = head.weight, head.bias
        outputs, targets = found.logits.flatten(0, 1), targets.flatten()
        each = weights[:, None].expand(labels.shape).flatten() if weights is not None else None
        if not shifted:  # a masked model uses a seventh of its outputs, a causal model all but one per row
            used = targets != IGNORED
            outputs, targets = outputs[used], targets[used]
            each = each[used] if each is not None else None
        loss = _summed(outputs, weight, bias, targets, each, smoothing)
        balance = getattr(found, "aux_loss", None)
        if self.training and balance is not None:
            counts = (targets != IGNORED) if each is None else each * (targets != IGNORED)
            loss = loss + _router_coefficient(network) * balance.to(loss.device) * counts.sum()
        return {"loss": loss}

    for module in network.modules():  # GPT-2's check for padding waits for the GPU in each batch
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _padding_is_known
    network.forward = MethodType(forward, network)


def _router_coefficient(network: PreTrainedModel) -> float:
    """The load-balancing coefficient of a mixture of experts; JetMoe has its own name for it."""
    names = ("router_aux_loss_coef", "aux_loss_coef")
    return next((float(getattr(network, name)) for name in names if hasattr(network, name)), 0.0)


def _padding_is_known(*_: Any) -> None:
    """Padding is on the right and has no labels."""


def _summed(
    outputs: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    each: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    """Summed cross entropy of outputs, which are logits if `weight`, that of the head, is None."""
    if weight is not None and chunks_pay(len(outputs), weight) and not smoothing:
        return _chunked(outputs, weight, bias, targets, each)
    logits = F.linear(outputs, weight, bias) if weight is not None else outputs
    reduction = "sum" if each is None else "none"
    nll = F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction=reduction, label_smoothing=smoothing)
    return nll if each is None else (nll * each).sum()


def chunks_pay(num_outputs: int, weight: torch.Tensor) -> bool:
    """torch's own rule: logits are cheaper if outputs or the vocabulary are fewer than hidden features."""
    num_classes, num_features = weight.shape
    return num_outputs >= num_features and num_classes > num_features


def chunk_size(num_classes: int, device: str) -> int | None:
    """Outputs whose logits are held at a time; None leaves the number to torch, which chose it for GPUs.

    On a CPU torch would take 8 for 50,257 classes, which takes 5.9 times as long as plain logits (1024 outputs of 256
    features, one thread); 64 take 1.22 times, 128 to 512 take 0.7 times as long.
    """
    return max(128, 2**24 // num_classes) if device == "cpu" else None


def _chunked(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    each: torch.Tensor | None,
) -> torch.Tensor:
    device = hidden.device.type
    # Autocast does not affect this function, so its inputs are cast as autocast would for a linear layer.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    bias = bias.to(dtype) if bias is not None else None
    # With weights in bfloat16 torch returns the sum in bfloat16: 4000 for 4062. Then, and for weighted rows, sum here.
    # This costs another product with the weights in backward.
    at_once = each is None and dtype == torch.float32
    with torch.autocast(device, enabled=False):
        nll = F.linear_cross_entropy(
            hidden,
            weight,
            targets,
            linear_bias=bias,
            reduction="sum" if at_once else "none",
            ignore_index=IGNORED,
            options=torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_size(len(weight), device)),
        )
    if at_once:
        return nll
    nll = nll.float()
    return nll.sum() if each is None else (nll * each).sum()


def _can_be_left_out(head: torch.nn.Linear) -> None:
    """While `left_out` is set, the model returns the input of its head. torch.compile supports such a flag."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if self.left_out else F.linear(hidden, self.weight, self.bias)

    head.left_out = False
    head.makes_logits = None
    head.forward = MethodType(forward, head)


@torch.no_grad()
def _makes_logits(network: PreTrainedModel, head: torch.nn.Linear, plain: Callable[..., Any]) -> bool:
    """Whether the output of the last layer is the logits; not if they are capped or scaled (Gemma, Granite).

    A forward pass over one token tells, because every model names its settings differently. It runs at the first pass
    with labels, when the model is on its device and in its precision.
    """
    returned: list[torch.Tensor] = []
    hook = head.register_forward_hook(lambda _module, _inputs, output: returned.append(output))
    training = network.training
    network.eval()
    device = head.weight.device
    one = torch.zeros((1, 1), dtype=torch.int64, device=device)
    autocast = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
    try:
        # No autocast cache, or the outer pass would reuse weights that were cast without a gradient.
        with torch.autocast(device.type, *autocast, cache_enabled=False):
            logits = plain(input_ids=one).logits
    finally:
        hook.remove()
        network.train(training)
    return len(returned) == 1 and returned[0] is logits
