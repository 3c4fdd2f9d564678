"""The checks at the start of a LipschitzMuon step, before it changes anything.

They find out whether the gradients are finite, and which weights are no longer as the last step
left them. On several processes all get the same answers: what one of them sees, all act on or
raise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin.distributed.owners import groups_of, largest_together, local
from lip_plugin.errors import ConfigError, DistributedError
from lip_plugin.optim.finite import largest_entries, refuse_non_finite_named

_NEVER = (-1, -1)


class Guard:
    """Remembers weights as the last projection left them: address, version and three numbers.

    A step relies on its weights being within their caps. A weight that something else has written
    to since is measured again instead. That may be a loaded checkpoint, or a user who writes
    through `.data`; no version counter sees the latter, which is why three numbers are compared
    too, see `_sums`.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[tuple[int, int], Tensor]] = {}

    def remember(self, weights: list[Tensor]) -> None:
        """Record that these weights are within their caps as they are now."""
        for w, sums in zip(weights, _sums(weights), strict=True):
            self._known[id(w)] = (_place(w), sums)

    def inspect(self, groups: list[dict[str, Any]], replicas: Any = None) -> set[int]:
        """Check the gradients, and find the matrices that are not as `remember` saw them.

        This costs one host synchronization, and one small all-reduce for each process group.

        Args:
            groups: the optimizer's parameter groups.
            replicas: process group whose members hold equal copies of the parameters.

        Returns:
            The ids of the matrices that were never remembered, or that something has written to
            since, with a gradient or without. They are the same ones on every process.

        Raises:
            NonFiniteError: a gradient on any process holds nan or inf.
            DistributedError: a parameter has a gradient on some processes only.
            ConfigError: a gradient is sparse.
        """
        entries = [(_name(g, i), p, g["kind"]) for g in groups for i, p in enumerate(g["params"])]
        names = [name for name, _, _ in entries]
        params = [p for _, p, _ in entries]
        present = [i for i, p in enumerate(params) if p.grad is not None]
        for i in present:
            if params[i].grad.is_sparse:
                raise ConfigError(
                    f"{names[i]} has a sparse gradient; build its embedding with sparse=False."
                )
        spread = groups_of(params, replicas)
        matrices = [i for i, (_, _, kind) in enumerate(entries) if kind == "matrix"]
        # Rows: the largest entry of each gradient, whether there is one, how far a weight moved.
        values = local(params[0]).new_zeros((3, len(params)), dtype=torch.float32)
        if present:
            values[0, present] = largest_entries([local(params[i].grad) for i in present])
            values[1, present] = 1.0
        if matrices:
            values[2, matrices] = self._moved([params[i] for i in matrices])
        if spread:
            values = self._agreed(values, spread, names)
        largest, _, moved = values.tolist()
        refuse_non_finite_named([f"gradient of {name}" for name in names], largest)
        return {id(params[i]) for i in matrices if moved[i] != 0.0}

    def _moved(self, weights: list[Tensor]) -> Tensor:
        """Distance of the sums to the remembered ones, plus 1 for another address or version."""
        sums = _sums(weights)
        never = (_NEVER, sums[0].new_full((3,), -1.0))
        known = [self._known.get(id(w), never) for w in weights]
        moved = torch.stack([(a - b).abs().amax() for a, (_, b) in zip(sums, known, strict=True)])
        elsewhere = [place != _place(w) for w, (place, _) in zip(weights, known, strict=True)]
        return torch.nan_to_num(moved, nan=1.0) + moved.new_tensor(elsewhere)

    @staticmethod
    def _agreed(values: Tensor, spread: list[Any], names: list[str]) -> Tensor:
        """The largest of each value over all processes, if the same gradients exist on each."""
        together = largest_together(torch.cat([values, 1.0 - values[1:2]]), spread)
        some = (together[1] > 0) & (together[3] > 0)
        if bool(some.any()):
            name = names[int(some.nonzero()[0])]
            raise DistributedError(
                f"{name} has a gradient on some processes and none on others, so they would step "
                "apart. Freeze the same parameters everywhere, and use all of them in every "
                "forward pass (DDP: find_unused_parameters=True)."
            )
        return together[:3]


def _name(group: dict[str, Any], index: int) -> str:
    return group["param_names"][index] if group.get("param_names") else f"parameter {index}"


def _place(weight: Tensor) -> tuple[int, int]:
    part = local(weight)
    return part.data_ptr(), part._version


def _sums(weights: list[Tensor]) -> list[Tensor]:
    """Of each local part, float32 [3]: numbers that together change with every entry and place.

    They are the Frobenius norm, the norm of the rows' weighted sums, and the weighted sum of those.
    The weights go from 1 to 2 along a row, and from 1 to 2 over the rows. So the second number sees
    signs and places within a row, and the third one the order and the signs of the rows.
    """
    found = []
    for w in weights:
        part = local(w.detach())
        wide = torch.promote_types(part.dtype, torch.float32)  # bf16 would often be equal
        rows = part.reshape(-1, part.shape[-1]) if part.numel() else part.new_zeros((1, 1))
        along, over = (
            torch.linspace(1.0, 2.0, n, dtype=wide, device=part.device) for n in rows.shape[::-1]
        )
        sums = rows.to(wide) @ along
        norm = torch.linalg.vector_norm(part, dtype=wide)
        found.append(torch.stack([norm, torch.linalg.vector_norm(sums), sums @ over]).float())
    return found
