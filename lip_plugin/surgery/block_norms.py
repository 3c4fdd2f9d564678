"""`block_norms(model)`: how large every block is now, as a multiple of its cap.

Open this file for the measurement that `project_`, the training logs and the certificates report.
Each number is a proven upper bound, so a value of at most 1 proves that the cap holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lip_plugin.distributed.owners import groups_of, largest_together, local, on_owners
from lip_plugin.linalg.norms import row_rms_max_upper
from lip_plugin.linalg.spectrum import SLACK
from lip_plugin.model.adapters import BlockNorms, layer_wrappers
from lip_plugin.model.batches import batches, cost_of
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW, Layout
from lip_plugin.surgery.state import constraints_of


@torch.no_grad()
def block_norms(model: nn.Module, *, only: frozenset[str] | None = None) -> list[BlockNorms]:
    """Measure every constrained layer: a proven upper bound of its block norms over their caps.

    Norms of matrices are RMS->RMS norms, norms of tables are the largest RMS norm of a row. Layers
    that an adapter wraps are measured with the adapter merged into the weight.

    Args:
        model: a retrofitted model, or one with budgets on its adapters. It may be wrapped.
        only: names of the layers to measure, without their adapters. None measures all layers.

    Returns:
        One entry for each layer, in the model's order. All processes get the same numbers.
    """
    root, _ = constraints_of(model)
    found = [(n, m) for n, m in constrained_modules(root) if only is None or n in only]
    weights, layouts = [m.weight for _, m in found], [m.layout for _, m in found]
    matrices = [i for i, layout in enumerate(layouts) if layout.norm != ROW]
    worst = torch.zeros(len(found), dtype=torch.float64)

    # The norm of a shard is not the norm of its matrix, so one process gets each whole matrix.
    def work(mine: list[int], wholes: list[Tensor], _: list[Tensor]) -> None:
        owned = [matrices[k] for k in mine]
        worst[owned] = torch.tensor(
            _worst(wholes, [layouts[i] for i in owned]), dtype=torch.float64
        )

    on_owners(
        [weights[i] for i in matrices],
        work,
        costs=[cost_of(weights[i], layouts[i]) for i in matrices],
        write=False,
    )
    # A shard of a table consists of whole rows, so each process measures its own.
    for i, layout in enumerate(layouts):
        for segment, rows in layout.views(local(weights[i])) if layout.norm == ROW else ():
            if segment.cap is not None and rows.numel():
                worst[i] = float(row_rms_max_upper(rows[0])) / segment.cap
    spread = groups_of(weights)
    if spread:
        device = local(weights[0]).device
        worst = largest_together(worst.to(device), spread).cpu()
    counts = [sum(s.count for s in layout.segments) for layout in layouts]
    plain = {
        name: BlockNorms(name, w, c)
        for (name, _), w, c in zip(found, worst.tolist(), counts, strict=True)
    }
    for wrapper in layer_wrappers() if only is None else ():
        for merged in wrapper.norms(root):
            # The layer multiplies with the merged weight, so the base alone is not reported.
            plain.pop(f"{merged.name}.base_layer", None)
            plain[merged.name] = merged
    return list(plain.values())


def _worst(weights: list[Tensor], layouts: list[Layout]) -> list[float]:
    """Largest proven norm over cap of each matrix, or 0 where no block of it has a cap."""
    worst = [0.0] * len(weights)
    for batch in batches(weights, layouts):
        if batch.cap is None:
            continue
        d_out, d_in = batch.views[0].shape[-2:]
        # The factor from sigma_max to the RMS->RMS norm, and the rounding of this line.
        factor = math.sqrt(d_in / max(1, d_out)) * SLACK / batch.cap
        upper = [value * factor for value in batch.sigma_max_upper()]
        start = 0
        for view, owner in zip(batch.views, batch.owners, strict=True):
            worst[owner] = max(worst[owner], *upper[start : start + view.shape[0]])
            start += view.shape[0]
    return worst
