"""Work on whole matrices that are sharded or replicated over several processes.

The norm of a shard is not the norm of its matrix, so a projection needs the whole matrix. If every
process gathered every matrix, all of them would do the same work. Here each matrix has one owner.
Its pieces travel once to the owner and once back:

- Sharded matrices (DTensors, as FSDP2 makes them): one all-to-all brings the pieces to the owners,
  and another one takes them back.
- Replicated matrices (DDP): every process has the matrix, so its owner starts at once, and one
  all-gather hands the results round. Replicas are then equal to the bit by construction.
- One process alone: nothing is sent.

All of it is collective: every process of the group calls the same functions in the same order.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lip_plugin.errors import DistributedError, UnsupportedModelError

T = TypeVar("T")
# The name of this function since torch 2.13, or the one before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# The most elements that one process owns in a round: 64 MiB of float32, or a few large matrices.
_ROUND = 1 << 24


@dataclass(frozen=True)
class Home:
    """Where the values of a tensor are: on this process, on each of a group, or cut over it."""

    group: Any = None  # a ProcessGroup, or None if only this process is concerned
    dim: int | None = None  # the axis that is cut, or None if each process has the whole tensor

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)


def processes() -> int:
    """The number of processes, which is 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_first(function: Callable[[], T]) -> T:
    """Call `function` on rank 0, and give all processes its result (it has to pickle) or error."""
    if processes() == 1:
        return function()
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except Exception as error:  # the other processes wait for an answer, so it is sent
            answer[1] = error
        try:
            pickle.dumps(answer)
        except Exception as error:
            answer = [
                None,
                DistributedError(
                    f"{answer[1] or answer[0]!r} cannot be sent to other processes: {error!r}"
                ),
            ]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process may hold a part only."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that is on this process, sharing its memory; all of a plain tensor."""
    if not is_sharded(tensor):
        return tensor
    part: Any = tensor.to_local()  # type: ignore[attr-defined]
    return part.wait() if hasattr(part, "wait") else part


def home_of(tensor: Tensor, replicas: Any = None) -> Home:
    """Where the values of a tensor are.

    Args:
        tensor: A plain tensor or a DTensor.
        replicas: The process group whose members hold equal copies of what is not sharded, or None.

    Raises:
        UnsupportedModelError: A DTensor that is not plainly cut along one of its axes.
    """
    if not is_sharded(tensor):
        return Home(
            replicas if replicas is not None and dist.get_world_size(replicas) > 1 else None
        )
    mesh, cut = tensor.device_mesh, []  # type: ignore[attr-defined]
    for axis, placement in enumerate(tensor.placements):  # type: ignore[attr-defined]
        if placement.is_replicate() or mesh.size(axis) == 1:
            continue
        # A subclass of Shard interleaves its pieces (_StridedShard, of FSDP over tensor
        # parallelism).
        if type(placement).__name__ != "Shard":
            raise UnsupportedModelError(
                f"a parameter is placed as {placement}: only Shard and Replicate are supported. "
                "Use fully_shard (FSDP2) alone, without tensor parallelism."
            )
        cut.append((axis, placement.dim % tensor.dim()))
    if len(cut) > 1:
        raise UnsupportedModelError(
            f"a parameter is cut along {len(cut)} axes of its device mesh: shard over one of them "
            "and replicate over the others (HSDP)."
        )
    if not cut:
        return Home()
    axis, dim = cut[0]
    return Home(mesh.get_group(axis), dim)


def pieces_of(length: int, processes: int) -> list[int]:
    """How many of `length` rows each process gets from torch.chunk. The last may have none."""
    chunk = -(-length // processes)
    return [
        max(0, min(chunk, length - start)) for start in range(0, chunk * processes, chunk or 1)
    ][:processes]


def owners(costs: Sequence[float], processes: int) -> list[int]:
    """An owner for each item. The work is shared as evenly as it may be.

    The costliest items come first, and each goes to the process that has the least work so far.
    """
    load = [0.0] * processes
    chosen = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        chosen[i] = min(range(processes), key=lambda p: (load[p], p))
        load[chosen[i]] += costs[i]
    return chosen


def _rounds(sizes: Sequence[int], owner: Sequence[int], processes: int) -> Iterator[list[int]]:
    """Items cut into rounds in which no process owns much more than `_ROUND` elements."""
    chunks: list[list[list[int]]] = []
    for process in range(processes):
        mine: list[list[int]] = []
        held = _ROUND
        for i in (i for i in range(len(sizes)) if owner[i] == process):
            if held + sizes[i] > _ROUND:
                mine.append([])
                held = 0
            mine[-1].append(i)
            held += sizes[i]
        chunks.append(mine)
    for together in zip_longest(*chunks, fillvalue=[]):
        yield sorted(i for chunk in together for i in chunk)


Work = Callable[[list[int], list[Tensor], list[Tensor]], None]


def on_owners(
    tensors: Sequence[Tensor],
    work: Work,
    *,
    replicas: Any = None,
    costs: Sequence[float] | None = None,
    extra: Callable[[int], Tensor] | None = None,
    write: bool = True,
) -> None:
    """Call `work` on whole tensors, each on its owner, and keep what it writes to them.

    Args:
        tensors: Plain tensors or DTensors, the same on every process.
        work: Called once a round as work(indices, wholes, extras). It changes `wholes` in place:
            the plain whole tensors that stand at `indices` in `tensors`.
        replicas: The process group whose members hold equal copies of the tensors that are not
            sharded. The work on those is then shared out as well. With None this process does it
            for itself.
        costs: The cost of the work on each tensor. None takes its number of elements.
        extra: Gives for the index of a sharded tensor this process's part of another tensor, which
            is cut in the same way. `work` gets it whole. It gets no extras for other tensors.
        write: Whether to hand the results back. With False `work` only looks.

    Raises:
        DistributedError: `work` failed on another process. On CUDA nobody asks.
        Exception: What `work` raised here. It comes once every process is through its exchanges.
    """
    homes: dict[tuple[Home, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        homes.setdefault((home_of(tensor, replicas), tensor.dtype), []).append(i)
    failure: BaseException | None = None
    for (home, _), members in homes.items():
        for indices, owner in _shares(home, tensors, members, costs):
            likes = [tensors[i] for i in indices]
            mine = [i for i, of in zip(indices, owner, strict=True) if of == home.rank]
            wholes = _gathered(home, likes, owner)
            extras: list[Tensor] = []
            if extra is not None and home.dim is not None:
                extras = _gathered(home, likes, owner, [extra(i) for i in indices])
            if mine and failure is None:
                try:
                    work(mine, wholes, extras)
                # It is raised when all are through, so that nobody is left waiting in an exchange.
                except Exception as error:
                    failure = error
            if write:
                _give_back(home, likes, owner, wholes)
    _raise_together(failure, groups_of(tensors, replicas), tensors)


def _shares(
    home: Home, tensors: Sequence[Tensor], members: list[int], costs: Sequence[float] | None
) -> Iterator[tuple[list[int], list[int]]]:
    """(indices of tensors, their owners) of each round. A process alone needs one round."""
    if home.size == 1:
        yield members, [0] * len(members)
        return
    sizes = [tensors[i].numel() for i in members]
    owner = owners(
        [float(sizes[k] if costs is None else costs[i]) for k, i in enumerate(members)], home.size
    )
    for part in _rounds(sizes, owner, home.size):
        yield [members[k] for k in part], [owner[k] for k in part]


def _raise_together(
    failure: BaseException | None, groups: list[Any], tensors: Sequence[Tensor]
) -> None:
    """Raise on every process if one has failed.

    On CUDA only the process that failed raises, because asking would cost a synchronization.
    """
    failed = torch.tensor([float(failure is not None)])
    if groups and local(tensors[0]).device.type == "cpu":
        for group in groups:
            dist.all_reduce(failed, dist.ReduceOp.MAX, group=group)
    if failure is not None:
        raise failure
    if bool(failed):
        raise DistributedError(
            "another process failed while it worked on its share; its own message says at what."
        )


def largest_together(values: Tensor, groups: Sequence[Any]) -> Tensor:
    """The entrywise largest value over all processes of each group. nan counts as inf."""
    values = torch.nan_to_num(values, nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    for group in groups:
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def groups_of(tensors: Sequence[Tensor], replicas: Any = None) -> list[Any]:
    """The process groups that hold parts or copies of the tensors, each once.

    These are the processes that have to agree about the tensors. The order is the same on all of
    them.
    """
    found: dict[Any, None] = {}
    for tensor in tensors:
        if is_sharded(tensor):
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            found |= {
                mesh.get_group(axis): None for axis in range(mesh.ndim) if mesh.size(axis) > 1
            }
        elif home_of(tensor, replicas).group is not None:
            found[replicas] = None
    return list(found)


def settle_(model: nn.Module) -> None:
    """Put every FSDP2 module back to its shards.

    After a forward pass without a backward pass FSDP2 leaves some parameters gathered.
    `module.weight` is then a copy that nobody trains, and what is written to it is lost. This sends
    nothing, and does nothing to modules that are sharded already.
    """
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def replicas_of(model: nn.Module) -> Any:
    """The process group of the DistributedDataParallel that `model` is or holds, or None."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    return None


def _gathered(
    home: Home, tensors: list[Tensor], owner: list[int], parts: list[Tensor] | None = None
) -> list[Tensor]:
    """The whole tensors that this process owns: of `tensors`, or of `parts` cut like them."""
    parts = [local(t) for t in tensors] if parts is None else [local(p) for p in parts]
    if home.dim is None:
        return [part for part, of in zip(parts, owner, strict=True) if of == home.rank]
    rows = [pieces_of(t.shape[home.dim], home.size) for t in tensors]
    send = [[p for p, of in zip(parts, owner, strict=True) if of == r] for r in range(home.size)]
    flat = [
        torch.cat([_flat(p, home.dim) for p in to]) if to else parts[0].new_empty(0) for to in send
    ]
    mine = [i for i, of in enumerate(owner) if of == home.rank]
    widths = [tensors[i].numel() // max(1, tensors[i].shape[home.dim]) for i in mine]
    counts = [
        sum(rows[i][s] * w for i, w in zip(mine, widths, strict=True)) for s in range(home.size)
    ]
    received = torch.empty(sum(counts), dtype=parts[0].dtype, device=parts[0].device)
    dist.all_to_all_single(
        received, torch.cat(flat), counts, [len(f) for f in flat], group=home.group
    )
    pieces: list[list[Tensor]] = [[] for _ in mine]
    for source, block in enumerate(received.split(counts)):
        lengths = [rows[i][source] * w for i, w in zip(mine, widths, strict=True)]
        for k, piece in enumerate(block.split(lengths)):
            pieces[k].append(piece)
    return [
        _shaped(torch.cat(found), tensors[i].shape, home.dim)
        for i, found in zip(mine, pieces, strict=True)
    ]


def _give_back(home: Home, tensors: list[Tensor], owner: list[int], wholes: list[Tensor]) -> None:
    """Write what the owners hold into the tensors of all processes."""
    if home.size == 1:
        return
    if home.dim is None:
        _hand_round(home, tensors, owner)
        return
    rows = [pieces_of(t.shape[home.dim], home.size) for t in tensors]
    mine = [i for i, of in enumerate(owner) if of == home.rank]
    cut = [
        _flat(w, home.dim).view(w.shape[home.dim], -1).split(rows[i])
        for i, w in zip(mine, wholes, strict=True)
    ]
    parts = [local(t) for t in tensors]
    send = [
        torch.cat([c[r].flatten() for c in cut]) if cut else parts[0].new_empty(0)
        for r in range(home.size)
    ]
    counts = [
        sum(p.numel() for p, of in zip(parts, owner, strict=True) if of == s)
        for s in range(home.size)
    ]
    received = torch.empty(sum(counts), dtype=parts[0].dtype, device=parts[0].device)
    dist.all_to_all_single(
        received, torch.cat(send), counts, [len(s) for s in send], group=home.group
    )
    for source, block in enumerate(received.split(counts)):
        start = 0
        for part, of in zip(parts, owner, strict=True):
            if of == source:
                part.copy_(_shaped(block[start : start + part.numel()], part.shape, home.dim))
                start += part.numel()


def _hand_round(home: Home, tensors: list[Tensor], owner: list[int]) -> None:
    """For replicas: every process takes each tensor from its owner."""
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        typed = [(t, of) for t, of in zip(tensors, owner, strict=True) if t.dtype == dtype]
        counts = [sum(t.numel() for t, of in typed if of == s) for s in range(home.size)]
        send = typed[0][0].new_zeros(max(counts))  # all-gather needs equal lengths
        mine = [t.flatten() for t, of in typed if of == home.rank]
        if mine:
            send[: counts[home.rank]] = torch.cat(mine)
        received = send.new_empty(max(counts) * home.size)
        _all_gather(received, send, group=home.group)
        for source in (s for s in range(home.size) if s != home.rank):
            start = source * max(counts)
            for t in (t for t, of in typed if of == source):
                t.copy_(received[start : start + t.numel()].view(t.shape))
                start += t.numel()


def _flat(piece: Tensor, dim: int) -> Tensor:
    """The entries with axis `dim` first. Pieces that were cut along `dim` then join end to end."""
    return piece.movedim(dim, 0).reshape(-1)


def _shaped(entries: Tensor, shape: Sequence[int], dim: int) -> Tensor:
    """The inverse of `_flat`."""
    moved = [shape[dim], *(n for axis, n in enumerate(shape) if axis != dim)]
    return entries.view(moved).movedim(0, dim)
