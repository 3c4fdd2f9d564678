"""Caps and steps of LipschitzMuon hold on large blocks.

They are large enough for bf16, for Gram forms, and for products by pieces.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lip_plugin import LipschitzMuon
from lip_plugin.linalg.norms import rms_to_rms_exact
from lip_plugin.model.layout import Layout, Segment, one_block
from lip_plugin.optim import muon, precision

SHAPES = {"wide": (390, 600), "tall": (300, 130), "square": (140, 140), "heads": (3 * 64, 256)}


def layout_of(kind: str, cap: float) -> Layout:
    d_out, _ = SHAPES[kind]
    if kind == "heads":
        return Layout("rms_to_rms", False, (Segment("q", 0, 3, 64, cap),))
    return one_block(kind, d_out, cap)


def optimizer_of(weights: dict[str, nn.Parameter], cap: float, **options) -> LipschitzMuon:
    layouts = [layout_of(kind, cap).to_plain() for kind in weights]
    group = {
        "params": list(weights.values()),
        "kind": "matrix",
        "layouts": layouts,
        "method": "soft_cap",
    }
    return LipschitzMuon([group], **options)


def blocks_of(kind: str, weight: torch.Tensor) -> torch.Tensor:
    ((_, blocks),) = layout_of(kind, 1.0).views(weight.detach())
    return blocks


def gradient(shape: tuple[int, int], step: int) -> torch.Tensor:
    """First one push for ever, of low rank beside noise, then hostile gradients.

    They are noise, of rank one, huge, and tiny.
    """
    generator = torch.Generator().manual_seed(step if step > 8 else 0)
    noise = torch.randn(shape, generator=generator)
    one = torch.randn(shape[0], 1, generator=generator) * torch.randn(shape[1], generator=generator)
    return [noise, one, one + 1e-3 * noise, 1e30 * noise, 1e-30 * one][step % 5 if step > 8 else 2]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A second thread waits ten times over on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_large_blocks_stay_within_their_caps_under_constant_and_hostile_gradients(precision):
    cap, rate = 1.0, 0.15
    weights = {kind: nn.Parameter(torch.zeros(shape)) for kind, shape in SHAPES.items()}
    optimizer = optimizer_of(weights, cap, lr=rate, precision=precision)
    largest = 0.0
    for step in range(13):
        before = {kind: p.detach().clone() for kind, p in weights.items()}
        for p in weights.values():
            p.grad = gradient(tuple(p.shape), step)
        optimizer.step()
        for kind, p in weights.items():
            norm = float(rms_to_rms_exact(blocks_of(kind, p)).max())
            assert norm <= cap * (1 + 1e-5), (kind, step)  # what a projection promises in float32
            largest = max(largest, norm)
            if (
                step < 3
            ):  # from zero, far below the cap: a step's own norm, which a projection only shortens
                moved = rms_to_rms_exact(blocks_of(kind, p.detach() - before[kind]))
                assert moved.max() <= rate * (1 + muon._ORTHOGONAL_SLACK)
                assert moved.min() >= 0.7 * rate * 0.9
    assert largest > 0.9  # the caps were reached


def test_bfloat16_is_chosen_where_the_processor_multiplies_it(monkeypatch):
    wide, narrow = torch.zeros(1, 64, 768), torch.zeros(1, 64, 128)
    for flags, expected in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({}, None),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags, raising=False)
        precision.cpu_multiplies_bf16.cache_clear()
        assert precision.update_precision(None, wide) == expected
        # orthogonalize's own choice is float32
        assert precision.update_precision(None, narrow) is None
        assert precision.update_precision(None, wide.double()) is None
        assert precision.update_precision("float32", wide) == torch.float32
        assert precision.update_precision("bfloat16", narrow) == torch.bfloat16
    monkeypatch.undo()
    precision.cpu_multiplies_bf16.cache_clear()


def test_weights_of_two_layouts_in_memory_are_stepped_alike():
    """Blocks of one weight are changed where they lie, stored either way."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(400, 800, generator=generator) * 0.02
    push = torch.randn(400, 800, generator=generator)
    plain, turned = nn.Parameter(start.clone()), nn.Parameter(start.t().contiguous())
    layouts = (one_block("a", 400, 1.0), one_block("a", 400, 1.0, transposed=True))
    for p, layout, grad in ((plain, layouts[0], push), (turned, layouts[1], push.t().contiguous())):
        group = {
            "params": [p],
            "kind": "matrix",
            "layouts": [layout.to_plain()],
            "method": "soft_cap",
        }
        optimizer = LipschitzMuon([group], lr=0.1, precision="float32", weight_decay=0.5)
        p.grad = grad
        optimizer.step()
    assert not torch.allclose(plain, start, atol=1e-3)
    torch.testing.assert_close(
        plain, turned.t(), rtol=0.0, atol=1e-5
    )  # float32 sums in another order
