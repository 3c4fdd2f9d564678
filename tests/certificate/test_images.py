"""The graph of an image model: patches, the class token and positions, under attack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lip_plugin import LipschitzMuon, certify, retrofit
from lip_plugin.certificate.graph.base import LinearNorms
from lip_plugin.certificate.graph.build import build
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.layers import ConstrainedConv2d
from tests.support.families import inputs_for, tiny
from tests.support.oracles import CAP_TOLERANCE, loss_of, paper, randomize_, worst_over_cap

NONE: dict[str, LinearNorms] = {}


def token_norm(x: torch.Tensor) -> float:
    return float(x.detach().double().square().mean(-1).sqrt().amax())


def vit(**fields: Any) -> Any:
    model = tiny("vit", **fields)
    retrofit(model, paper(pixel_max=2.0))
    return randomize_(model)


def test_patches_are_the_librarys_embedding_for_any_grid() -> None:
    for fields in ({}, {"image_size": (8, 12), "patch_size": (2, 3), "num_channels": 3}):
        model = vit(**fields).double()
        graph = build(model)
        x = graph.entry.sample(0, torch.Generator().manual_seed(1), "cpu")
        assert float(x.abs().max()) <= 2.0
        with torch.no_grad():
            got, expected = graph.embed(x, torch.float64), model.vit.embeddings(x)
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
        assert graph.patches.d_in == math.prod(
            model.vit.embeddings.patch_embeddings.projection.weight.shape[1:]
        )


def test_a_change_of_pixels_moves_each_token_by_at_most_sigma_times_its_size() -> None:
    model = vit()
    graph = build(model)
    weight = graph.patches.weight().detach().double()
    sigma = float(torch.linalg.matrix_norm(weight, 2))
    x = graph.entry.sample(0, torch.Generator().manual_seed(1), "cpu")
    with torch.no_grad():
        for i in range(20):
            change = torch.randn(x.shape, dtype=torch.float64)
            if i >= 10:  # all of it in one patch, along the steepest direction: attained
                change = torch.zeros_like(x)
                top = torch.linalg.svd(weight).Vh[0].view(2, 4, 4)
                change[:, :, :4, 4:8] = (i - 9) * top
            eps = float(change[0].norm())
            moved = graph.embed(x + change, torch.float64) - graph.embed(x, torch.float64)
            by_token = moved[0].norm(dim=-1)
            assert float(moved[0].norm()) <= sigma * eps * (1 + 1e-9)
            assert float(by_token.max()) <= sigma * eps * (1 + 1e-9)
            if i >= 10:
                assert float(by_token.max()) == pytest.approx(sigma * eps, rel=1e-9)


@pytest.mark.parametrize("source", ["weights", "caps"])
def test_every_image_within_the_assumed_pixels_lies_in_the_radius(source: str) -> None:
    model = vit()
    if source == "caps":
        from lip_plugin import project_

        project_(model)
    certificate, graph = certify(model, source), build(model)
    for seed in range(20):
        x = graph.entry.sample(0, torch.Generator().manual_seed(seed), "cpu").sign() * 2.0
        assert token_norm(graph.embed(x, torch.float64)) <= certificate.radius
    assert any("at most 2 in absolute value" in line for line in certificate.assumptions)


def test_the_convolution_and_the_bare_tables_are_kept_within_their_caps() -> None:
    model = tiny("vit")
    retrofit(model, paper())
    conv = model.vit.embeddings.patch_embeddings.projection
    assert type(conv) is ConstrainedConv2d
    optimizer, x = LipschitzMuon(model, lr=0.3), inputs_for("vit", 5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(12):
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE
    for name in ("patch_embeddings.projection.weight", "cls_token", "position_embeddings"):
        assert not torch.equal(
            dict(model.named_parameters())[f"vit.embeddings.{name}"],
            before[f"vit.embeddings.{name}"],
        )
    with torch.no_grad():
        model.vit.embeddings.cls_token.mul_(50)
        conv.weight.mul_(50)
    from lip_plugin import project_

    assert worst_over_cap(model) > 10
    project_(model)
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def test_overlapping_patches_are_refused_by_name() -> None:
    model = tiny("vit")
    model.vit.embeddings.patch_embeddings.projection.stride = (2, 2)
    with pytest.raises(UnsupportedModelError, match="projection.*stride"):
        retrofit(model, paper())
    with pytest.raises(UnsupportedModelError, match="projection"):
        certify(model)
