"""MarginLoss: cross-entropy that goes on until the right logit leads by a margin, so that more predictions can be proven."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lip_plugin.errors import ConfigError
from lip_plugin.surgery.state import require_retrofit


class MarginLoss:
    """Cross-entropy after `margin` is taken from every right logit; in eval mode the plain cross-entropy.

        Trainer(model, args, train_dataset=data, compute_loss_func=MarginLoss(model, 0.3), callbacks=[LipschitzCallback()])

    A prediction is proven at eps if its logit leads by about eps times the network's constant. A higher temperature widens
    leads by making the loss flatter everywhere; the margin only moves where it is satisfied, and costs less
    accuracy for the same proof (docs/LOG.md, 2026-11-25). Known from margin losses such as arXiv 1802.04034 (there times
    the Lipschitz constant) and 1801.07698.

    Args:
        model: retrofitted, wrapped or not. Trainer retrofits at its construction: call `retrofit` first.
        margin: in units of the logits at the network's own scale, before `logit_scale` multiplies them; at least 0.

    Raises:
        ConfigError: a margin that is negative or not finite.
        NotRetrofittedError: no constrained layer in `model`.
    """

    def __init__(self, model: nn.Module, margin: float) -> None:
        if not 0 <= margin < float("inf"):
            raise ConfigError(
                f"MarginLoss(margin={margin!r}): must be a finite number, at least 0."
            )
        root, state = require_retrofit(model)
        self.model, self.margin = root, float(margin)
        self._scale = float(state.config.logit_scale or 1.0)
        causal = state.architecture.attention.causal
        self._shifted = (
            causal and not state.architecture.one_token
        )  # a logit is about the next token

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """The loss of a batch, as Trainer's `compute_loss_func` calls it.

        Args:
            outputs: what the model returned, or logits [batch, tokens, vocabulary] or [batch, classes].
            labels: [batch, tokens] (for causal models those of the same tokens) or [batch]; -100 is left out.
            num_items_in_batch: labels in the whole accumulated batch, in training; None takes the mean over this one.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        if self._shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.flatten().to(logits.device)
        if self.model.training and self.margin:
            lowered = logits.new_full((len(labels), 1), -self.margin * self._scale)
            logits = logits.scatter_add(1, labels.clamp_min(0)[:, None], lowered)
        if (
            num_items_in_batch is None or not self.model.training
        ):  # Trainer averages evaluation batches itself
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
