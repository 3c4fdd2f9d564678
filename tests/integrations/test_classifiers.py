"""Models that read token ids by their value are certified without padding, and refused with it.

The value decides which token a classifier reads, and where positions begin. Heads that call their
activation as a function are here too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.roberta import modeling_roberta

from lip_plugin import (
    activation_report,
    attacked_accuracy,
    certified_accuracy,
    certified_radius,
    certify,
    drift,
    project_,
    retrofit,
)
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.nodes import Activation, OneToken
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.errors import CertificateError, ConfigError
from lip_plugin.integrations.huggingface.loading import certify_streamed
from lip_plugin.model import architecture as core
from tests.support.families import PADDED, PADDING, TEXT_CLASSIFIERS, inputs_for, tiny
from tests.support.oracles import logits_of, paper, random_model, randomize_

LAST = tuple(name for name in PADDED if name in TEXT_CLASSIFIERS and not name.startswith("roberta"))


def graph_logits(model: nn.Module, ids: Tensor) -> Tensor:
    graph = build(model)
    with torch.no_grad():
        return graph.body.run(graph.embed(ids, torch.float64))


def worst_difference(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("name", PADDED)
def test_the_graph_is_the_model_without_padding_and_another_model_with_it(name: str) -> None:
    """Padding makes another model of it, so that refusing padding is needed.

    Each padded batch gives logits that the graph does not have.
    """
    model = random_model(name, paper()).double()
    ids = inputs_for(name, 3, 8)
    assert (
        worst_difference(graph_logits(model, ids), logits_of(model, ids)) < 1e-6
    )  # rotations in float32
    for where in (-1, 3):
        padded = ids.clone()
        padded[:, where] = PADDING
        if name in LAST and where == 3:
            continue  # a classifier on the last token: only what stands at the end matters
        assert worst_difference(graph_logits(model, padded), logits_of(model, padded)) > 1e-3, where


@pytest.mark.parametrize("name", PADDED)
def test_ids_with_padding_have_no_radius_and_the_message_says_what_to_do(name: str) -> None:
    model = random_model(name, paper())
    ids = inputs_for(name, 2, 6)
    labels = logits_of(model, ids).argmax(-1)
    batch = {"input_ids": ids, "labels": labels[:, 0] if name in TEXT_CLASSIFIERS else labels}
    certified_radius(model, ids, refine=0)  # as it is there is one
    ids[1, 2] = PADDING
    calls = (
        lambda: certified_radius(model, ids),
        lambda: certified_accuracy(model, [batch]),
        lambda: attacked_accuracy(model, [batch]),
        lambda: activation_report(model, ids),
    )
    for call in calls:
        with pytest.raises(ConfigError, match=r"hold 9, the model's padding id.*without padding"):
            call()


def test_a_model_that_reads_ids_alike_has_a_radius_at_its_padding_id() -> None:
    """A model that reads all ids alike has a radius at its padding id.

    bert's positions and its first token do not depend on ids, and its mask is refused elsewhere.
    """
    model = random_model("bert_classifier", paper()).double()
    ids = inputs_for("bert_classifier", 2, 6)
    ids[:, 3] = model.config.pad_token_id
    assert torch.equal(
        certified_radius(model, ids, refine=0).prediction, logits_of(model, ids).argmax(-1)
    )


@pytest.mark.parametrize("name", LAST)
def test_a_classifier_without_padding_id_is_run_one_sequence_at_a_time(
    name: str, tmp_path: Any
) -> None:
    model = tiny(name, pad_token_id=None)
    ids = inputs_for(name, 3, 6)
    ids[0, -1] = PADDING  # an id like any other here
    with pytest.raises(ValueError, match="batch sizes > 1"):
        model(ids)
    retrofit(model, paper())
    randomize_(model).double()
    one_by_one = torch.cat([logits_of(model, one) for one in ids.split(1)])
    assert worst_difference(graph_logits(model, ids), one_by_one) < 1e-6  # rotations in float32
    assert torch.equal(certified_radius(model, ids, refine=0).prediction, one_by_one.argmax(-1))
    model.float().save_pretrained(tmp_path)
    assert certify_streamed(tmp_path).lipschitz == certify(model).lipschitz


@pytest.mark.parametrize("name", ["llama_classifier", "roberta"])
def test_a_padding_id_outside_the_small_models_vocabulary_is_streamed(
    name: str, tmp_path: Any
) -> None:
    model = tiny(name, vocab_size=200, pad_token_id=150, max_position_embeddings=200)
    retrofit(model, paper())
    randomize_(model).save_pretrained(tmp_path)
    assert certify_streamed(tmp_path) == certify(model)


@pytest.mark.parametrize("padding", [0, 9, 66])
@pytest.mark.parametrize("name", ["gpt2_classifier", "roberta"])
def test_inputs_of_the_comparison_are_all_ids_but_padding(name: str, padding: int) -> None:
    fields = {"max_position_embeddings": padding + 60}
    graph = build(tiny(name, pad_token_id=padding, **fields))
    ids = graph.entry.sample(2000, torch.Generator().manual_seed(0), "cpu")
    assert ids.shape[1] == graph.entry.longest == (59 if name == "roberta" else padding + 60)
    seen = set()
    for seed in range(60):
        seen |= set(
            graph.entry.sample(50, torch.Generator().manual_seed(seed), "cpu").flatten().tolist()
        )
    assert seen == set(range(67)) - {padding}


def test_positions_that_reach_no_further_than_five_tokens_are_compared_on_five() -> None:
    model = tiny("roberta", max_position_embeddings=PADDING + 6)
    retrofit(model, paper())
    assert build(randomize_(model)).entry.longest == 5
    assert certify(model).lipschitz > 0
    ids = inputs_for("roberta", 2, 5)
    assert worst_difference(graph_logits(model.double(), ids), logits_of(model, ids)) < 1e-10


def test_padding_of_roberta_lies_in_the_radius_and_may_attain_it() -> None:
    """The padding of roberta lies within the radius, and may attain it.

    It has a row of positions of its own, which no sequence without padding reads. Every row counts.
    """
    model = random_model("roberta", paper())
    rows = model.roberta.embeddings
    with torch.no_grad():  # the largest sum of rows of all is that of padding at its place
        rows.word_embeddings.weight[PADDING] = 3.0
        rows.position_embeddings.weight[PADDING] = 4.0
        rows.token_type_embeddings.weight[0] = 5.0
        radius = float(radius_of(build(model), "weights"))
        ids = torch.randint(67, (8, 20))
        ids[:, ::3] = PADDING
        seen = model.double().roberta.embeddings(ids).square().mean(-1).sqrt()
    assert float(seen.max()) == 12.0 <= radius <= 12.0 * 1.001
    assert bool((seen[:, ::3] == 12.0).all())
    model.float()
    project_(model)
    with torch.no_grad():
        seen = model.double().roberta.embeddings(ids).square().mean(-1).sqrt()
    assert float(seen.max()) <= float(radius_of(build(model), "caps"))


BREAKS = {
    "another token": ("gpt2_classifier", {"readout": (("first", ""),)}),
    "the first token in place of the last": ("llama_classifier", {"readout": (("first", ""),)}),
    "the last token in place of the first": (
        "roberta_classifier",
        {"readout": (("last", ""), ("dense", "classifier.dense"), ("function", "tanh"))},
    ),
    "positions from row 0": ("roberta", {"positions_follow_padding": False}),
    "another function": (
        "distilbert_classifier",
        {"readout": (("first", ""), ("dense", "pre_classifier"), ("function", "gelu"))},
    ),
    "the other form of gelu": (
        "roberta",
        {
            "readout": (
                ("dense", "lm_head.dense"),
                ("function", "gelu_tanh"),
                ("norm", "lm_head.layer_norm"),
            )
        },
    ),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_wrong_description_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong description of which token is read, or where positions begin, is refused.

    So is a wrong function.
    """
    name, changes = BREAKS[what]
    certify(random_model(name, paper()))
    family = core._FAMILIES[name]
    wrong = replace(family, architecture=replace(family.architecture, **changes))
    monkeypatch.setitem(core._FAMILIES, name, wrong)
    with pytest.raises(CertificateError, match="reproduce"):
        certify(random_model(name, paper()))


def test_a_head_whose_function_was_exchanged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_roberta, "gelu", torch.relu)
    with pytest.raises(CertificateError, match="reproduce"):
        certify(random_model("roberta", paper()))


@pytest.mark.parametrize(
    ("name", "kind", "slope"),
    [
        ("roberta", "gelu", 1.12890415),
        ("roberta_classifier", "tanh", 1.0),
        ("distilbert_classifier", "relu", 1.0),
    ],
)
def test_a_function_is_not_scaled_and_counts_its_slope(name: str, kind: str, slope: float) -> None:
    model = random_model(name, paper())
    (node,) = (n for n in build(model).readout if isinstance(n, Activation))
    assert (node.kind, float(node.factor)) == (kind, 1.0)
    (row,) = (row for row in certify(model).layers if row.name == node.name)
    assert slope <= row.lipschitz <= slope * (1 + 1e-12)
    x = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    steepest = float((node.run(x[1:]) - node.run(x[:-1])).abs().max() / (x[1] - x[0]))
    assert (
        slope * (1 - 1e-6) <= steepest <= slope * (1 + 1e-9)
    )  # attained; rounding of the differences


def test_drift_is_refused_between_models_that_read_other_tokens() -> None:
    base = random_model("llama_classifier", paper())
    tuned = random_model("llama_classifier", paper(), pad_token_id=12)
    with pytest.raises(ConfigError, match="pad_token_id is 9 in the base and 12 in the tuned"):
        drift(base, tuned, attack=False)
    tuned.config.pad_token_id = PADDING  # the cure that is named
    assert drift(base, tuned, attack=False).logit_upper == 0.0


def test_which_token_a_family_reads_is_said_by_its_graph() -> None:
    for name in TEXT_CLASSIFIERS:
        (node,) = (n for n in build(tiny(name)).readout if isinstance(n, OneToken))
        assert node.name == ("last token" if name in LAST else "first token")
        assert node.padding == (PADDING if name in LAST else None)
