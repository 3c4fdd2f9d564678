"""A certificate streamed from files has the numbers of the one in memory.

It needs the memory of one layer.
"""

from __future__ import annotations

import json

import pytest
import torch

from lip_plugin import certify, project_, retrofit
from lip_plugin.errors import (
    CertificateError,
    CheckpointError,
    ConfigError,
    NonFiniteError,
    UnsupportedModelError,
)
from lip_plugin.integrations.huggingface.loading import certify_streamed, load_saved_model
from tests.support.families import CLASSIFIERS, HEADS, HF_FAMILIES, tiny
from tests.support.oracles import paper, randomize_

hf_family = pytest.mark.parametrize("family", HF_FAMILIES)


def saved(family, folder, norms="remove", size="50GB", **overrides):
    """A model with trained-like weights, and its folder."""
    model = tiny(family, **overrides)
    if norms is not None:
        head = HEADS.get(family, "lm_head")
        retrofit(model, paper(w_max=1.7, overrides={head: 2.0}, biases="drop", norms=norms))
    randomize_(model)
    if norms is not None:
        project_(model)
    model.save_pretrained(folder, max_shard_size=size)
    return model


@hf_family
@pytest.mark.parametrize("norms", ["remove", "keep", None])
def test_streamed_and_in_memory_are_equal_to_the_last_digit(family, norms, tmp_path):
    """A streamed certificate equals the one in memory: bound, radius, layers, fingerprint.

    norms=None is a plain model, tied where its family is by default.
    """
    saved(family, tmp_path, norms, num_hidden_layers=3)
    loaded = load_saved_model(tmp_path)
    assert certify_streamed(tmp_path) == certify(loaded)
    if norms is not None:
        assert certify_streamed(tmp_path, "caps") == certify(loaded, "caps")


@hf_family
def test_sharded_and_in_bfloat16_too(family, tmp_path):
    model = saved(family, tmp_path / "whole")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    certificate = certify_streamed(tmp_path / "shards")
    assert certificate == certify(load_saved_model(tmp_path / "shards"))
    assert certificate.weights != certify_streamed(tmp_path / "whole").weights


def test_every_family_streams_a_tied_model(tmp_path):
    for family in HF_FAMILIES:
        if family in CLASSIFIERS:
            continue  # no head over the vocabulary
        saved(family, tmp_path / family, None, tie_word_embeddings=True)
        loaded = load_saved_model(tmp_path / family)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert certify_streamed(tmp_path / family) == certify(loaded)


def test_no_more_than_one_layer_is_there_at_a_time(tmp_path, monkeypatch):
    """No more than one layer is there at a time.

    At each measurement the numbers of the skeleton's tensors that have values are counted.
    """
    import lip_plugin.certificate.streaming as streaming

    model = saved("gpt2", tmp_path, num_hidden_layers=6)
    layer = sum(p.numel() for p in model.transformer.h[0].parameters() if p.dim() > 1)
    small = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    seen = []

    def counted(graph):
        seen.append(sum(p.numel() for p in graph.root.parameters() if not p.is_meta))
        return measured(graph)

    measured = streaming.weight_norms
    monkeypatch.setattr(streaming, "weight_norms", counted)
    certify_streamed(tmp_path)
    assert len(seen) >= 7
    assert max(seen[:6]) <= layer + small + 200  # 200: a longest row of each table
    assert sum(p.numel() for p in model.parameters()) > 5 * layer


def test_progress_sees_every_layer(tmp_path):
    saved("llama", tmp_path, num_hidden_layers=4)
    seen = []

    def progress(groups):
        for group in groups:
            seen.append(group)
            yield group

    certify_streamed(tmp_path, progress=progress)
    assert sum(any(n.startswith("model.layers.") for n in group) for group in seen) == 4
    assert sum(len(g) for g in seen) == 4 * 7 + 2


def test_a_structure_that_the_graph_does_not_reproduce_is_refused_here_too(tmp_path, monkeypatch):
    from transformers.models.llama import modeling_llama

    saved("llama", tmp_path)
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 1.5 * forward(self, x))
    with pytest.raises(CertificateError, match="does not reproduce"):
        certify_streamed(tmp_path)


def test_a_layer_of_a_kind_that_the_twin_lacks_is_refused(tmp_path, monkeypatch):
    import lip_plugin.integrations.huggingface.loading as checkpoint

    saved("llama", tmp_path, num_hidden_layers=3)
    build = checkpoint._skeleton

    def odd(cls, config):
        model = build(cls, config)
        model.model.layers[2].mlp.extra = torch.nn.Identity()
        return model

    monkeypatch.setattr(checkpoint, "_skeleton", odd)
    with pytest.raises(CertificateError, match=r"layers\.2.*of a kind"):
        certify_streamed(tmp_path)


def test_nan_a_source_and_a_base_model_are_refused_by_name(tmp_path):
    model = saved("gpt2", tmp_path / "ok")
    with pytest.raises(ConfigError, match="source"):
        certify_streamed(tmp_path / "ok", "guess")
    model.transformer.h[1].mlp.c_fc.weight.data[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    for source in ("weights", "caps"):
        with pytest.raises(NonFiniteError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight"):
            certify_streamed(tmp_path / "nan", source)
    base = tiny("gpt2").transformer
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["GPT2LMHeadModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="base model"):
        certify_streamed(tmp_path / "base")


@pytest.mark.parametrize("family", ["gpt_neox", "vit"])
def test_tensors_under_old_names_are_told_apart(family, tmp_path):
    """An edited tensor is noticed by its name, even if the file has another name for it.

    transformers saves these families under other names than the model's.
    """
    from safetensors.torch import load_file, save_file

    model = saved(family, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert tensors.keys() != model.state_dict().keys(), (
        "saved under the model's own names: this test is void"
    )
    old = next(name for name in tensors if name not in model.state_dict())
    new = {"gpt_neox": "lm_head.weight"}.get(family, old)
    save_file(
        {**tensors, new: tensors[old].clone()} | {"extra": torch.zeros(2)}, file, {"format": "pt"}
    )
    with pytest.raises(CheckpointError, match="several names" if family == "gpt_neox" else "extra"):
        certify_streamed(tmp_path)
    save_file({k: v for k, v in tensors.items() if k != old}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match="1 missing"):
        certify_streamed(tmp_path)


def test_tensors_that_are_converted_while_loading_are_refused_with_the_cure(tmp_path, monkeypatch):
    from transformers.core_model_loading import Transpose, WeightConverter

    import lip_plugin.integrations.huggingface.shards as files

    saved("llama", tmp_path)
    turned = WeightConverter("q_proj.weight", "q_proj.weight", operations=[Transpose(0, 1)])
    monkeypatch.setattr(files, "get_model_conversion_mapping", lambda model: [turned])
    with pytest.raises(UnsupportedModelError, match=r"q_proj.*call certify\(model\)"):
        certify_streamed(tmp_path)
