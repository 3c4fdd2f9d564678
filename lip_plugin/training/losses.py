"""MarginLoss: cross-entropy that asks the right logit to lead by a margin.

A larger lead allows more predictions to be proven robust.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lip_plugin.errors import ConfigError
from lip_plugin.surgery.state import require_retrofit


class MarginLoss:
    """Cross-entropy in which every right logit is first lowered by a margin.

        loss = MarginLoss(model, 0.3)
        Trainer(model, args, train_dataset=data, compute_loss_func=loss,
        callbacks=[LipschitzCallback()])

    In eval mode it is the plain cross-entropy.

    A prediction is proven at eps if its logit leads by about eps times the network's Lipschitz
    constant. A higher temperature widens leads too, but by making the loss flatter everywhere. The
    margin only moves the point where the loss is satisfied, and costs less accuracy for the same
    proof (docs/LOG.md, 2026-11-25).

    Source: margin losses such as those of arXiv 1801.07698 and arXiv 1802.04034 (in the latter the
    margin is multiplied by the Lipschitz constant).

    Args:
        model: a retrofitted model, wrapped or not. LipschitzCallback would retrofit it only when
            the Trainer is built, so call `retrofit` before.
        margin: at least 0, in units of the logits before `logit_scale` multiplies them.

    Raises:
        ConfigError: the margin is negative or not finite.
        NotRetrofittedError: `model` has no constrained layer.
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
        # The logits at a token of a causal model predict the next token.
        self._shifted = causal and not state.architecture.one_token

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Compute the loss of a batch, as the Trainer's `compute_loss_func` calls it.

        Args:
            outputs: what the model returned, or logits [batch, tokens, vocabulary] or [batch,
                classes].
            labels: [batch, tokens] or [batch]. Those of causal models belong to the same tokens as
                the inputs and are shifted here. Entries of -100 are left out.
            num_items_in_batch: how many labels the whole accumulated batch has; it is used in
                training only. None takes the mean over this batch.

        Returns:
            The loss, a scalar.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs
        if self._shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.flatten().to(logits.device)
        if self.model.training and self.margin:
            lowered = logits.new_full((len(labels), 1), -self.margin * self._scale)
            logits = logits.scatter_add(1, labels.clamp_min(0)[:, None], lowered)
        # In evaluation the Trainer averages over the batches itself.
        if num_items_in_batch is None or not self.model.training:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch
