"""A saved model comes back with the same bits, and without the plugin with an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from lip_plugin import (
    LipschitzCallback,
    LipschitzConfig,
    LipschitzMuon,
    certify,
    project_,
    release,
    retrofit,
)
from lip_plugin.errors import ConfigError
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.scales import ConstantScale
from lip_plugin.surgery.state import find_retrofit
from tests.support.families import CLASSIFIERS, HF_FAMILIES, auto_class, inputs_for, tiny
from tests.support.oracles import CAP_TOLERANCE, logits_of, paper, randomize_, worst_over_cap

hf_family = pytest.mark.parametrize("family", HF_FAMILIES)
CONFIG = paper(w_max=1.7, method="hard_cap", residual=0.3)
LOAD = """
import warnings
import torch
import transformers
model, info = transformers.{auto}.from_pretrained({path!r}, output_loading_info=True)
kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
assert not any(info[k] for k in kinds), info
logits = model.eval()(torch.load({ids!r})).logits
torch.save(logits.detach(), {out!r})
print("loaded", type(model).__name__)
"""


def saved(family: str, folder: Path, config: LipschitzConfig = CONFIG, **overrides):
    """A model with trained-like weights, its ids and logits, saved."""
    model = tiny(family, **overrides)
    retrofit(model, config)
    project_(randomize_(model))
    ids = inputs_for(family, tokens=9)
    model.save_pretrained(folder)
    return model, ids, logits_of(model, ids)


def python(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("first", ["import lip_plugin", "import transformers"])
def test_a_fresh_process_loads_every_family_to_the_last_bit_in_either_import_order(first, tmp_path):
    torch.set_num_threads(1)
    code, expected = f"{first}\nimport lip_plugin\n", {}
    # the order of the imports is no matter of the family: a few of the second order stand for all
    families = HF_FAMILIES if first == "import lip_plugin" else ("gpt2", "gemma2", "vit")
    for family in families:
        _, ids, expected[family] = saved(family, tmp_path / family)
        torch.save(ids, tmp_path / f"{family}.ids")
        paths = {"path": str(tmp_path / family), "ids": str(tmp_path / f"{family}.ids")}
        paths["auto"] = auto_class(family).__name__
        code += LOAD.format(**paths, out=str(tmp_path / f"{family}.out"))
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("loaded") == len(families)
    for family, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{family}.out").reshape(logits.shape), logits), (
            family
        )


@pytest.mark.parametrize("norms", ["remove", "keep"])
def test_without_the_plugin_every_family_fails_closed(norms, tmp_path):
    code = "import transformers\n"
    # With kept norms nothing of ours is in the config's fields, so four families stand for all.
    families = HF_FAMILIES if norms == "remove" else ("gpt2", "llama", "bert", "vit")
    for family in families:
        saved(family, tmp_path / family, paper(norms=norms))
        code += f"""
try:
    transformers.{auto_class(family).__name__}.from_pretrained({str(tmp_path / family)!r})
except Exception as error:
    print("refused", type(error).__name__, error)
else:
    print("LOADED", {family!r})
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    if norms == "remove":
        assert "LOADED" not in result.stdout
        assert result.stdout.count("refused") == len(families)
        assert result.stdout.count("import lip_plugin") == len(
            families
        )  # each message names what to do
    else:  # with its norms a model is the same function without the plugin: plain layers, no caps
        assert result.stdout.count("LOADED") == len(families)


@hf_family
def test_it_loads_with_its_config_its_constants_and_its_caps(family, tmp_path):
    model, ids, expected = saved(family, tmp_path)
    loaded, info = auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(
        info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    )
    assert torch.equal(logits_of(loaded, ids), expected)
    state = find_retrofit(loaded)[1]
    assert state.config == find_retrofit(model)[1].config
    assert {n: m.layout for n, m in constrained_modules(loaded)} == {
        n: m.layout for n, m in constrained_modules(model)
    }
    scales = [
        [m.scale for m in x.modules() if isinstance(m, ConstantScale)] for x in (model, loaded)
    ]
    assert scales[0] == scales[1]
    assert certify(loaded) == certify(model)
    assert type(loaded) is type(model)


def test_dropped_biases_stay_fixed_after_loading(tmp_path):
    """Loading makes new Parameters, which would train again."""
    model, _, _ = saved("gpt2", tmp_path, paper(biases="drop"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    fixed = [{n for n, p in x.named_parameters() if not p.requires_grad} for x in (model, loaded)]
    assert len(fixed[0]) == 8
    assert fixed[0] == fixed[1]


@hf_family
def test_a_loaded_model_bears_no_trace_of_quantization(family, tmp_path):
    saved(family, tmp_path)
    loaded = auto_class(family).from_pretrained(tmp_path)
    assert not getattr(loaded, "is_quantized", False)
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not getattr(loaded, "quantization_method", None)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.parameters())
    loaded.to(torch.float64).float()  # transformers refuses .to(dtype) of quantized models


@hf_family
def test_saved_a_second_time_it_is_the_same_files(family, tmp_path):
    saved(family, tmp_path / "1")
    auto_class(family).from_pretrained(tmp_path / "1").save_pretrained(tmp_path / "2")
    auto_class(family).from_pretrained(tmp_path / "2").save_pretrained(tmp_path / "3")
    contents = [{p.name: p.read_bytes() for p in (tmp_path / f).iterdir()} for f in "123"]
    assert contents[0].keys() == contents[1].keys() == contents[2].keys()
    assert contents[1] == contents[2]
    assert contents[0]["model.safetensors"] == contents[1]["model.safetensors"]
    one, two = (json.loads(c["config.json"]) for c in contents[:2])
    assert one["quantization_config"] == two["quantization_config"]


@hf_family
def test_the_file_has_the_plain_keys_minus_the_norms(family, tmp_path):
    """The file has the keys of a plain model without those of its norms.

    It is compared with the file of a plain model, because transformers renames some families' keys.
    """
    saved(family, tmp_path / "constrained", CONFIG, tie_word_embeddings=False)
    tiny(family, tie_word_embeddings=False).save_pretrained(tmp_path / "plain")
    keys = {}
    for which in ("constrained", "plain"):
        with safe_open(tmp_path / which / "model.safetensors", "pt") as file:
            keys[which] = set(file.keys())
    norms = (
        "ln_1",
        "ln_2",
        "ln_f",
        "layernorm",
        "layer_norm",
        "LayerNorm",
        "model.norm",
        "q_norm",
        "k_norm",
    )
    assert keys["constrained"] == {k for k in keys["plain"] if not any(n in k for n in norms)}


@hf_family
def test_it_loads_in_bfloat16(family, tmp_path):
    model, ids, expected = saved(family, tmp_path)
    loaded = auto_class(family).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(
        torch.equal(p, q.to(torch.bfloat16))
        for p, q in zip(loaded.parameters(), model.parameters(), strict=True)
    )
    got = logits_of(loaded, ids)
    assert got.dtype == torch.bfloat16
    # 8 significant bits through some twenty roundings
    assert (
        float((got.float() - expected).detach().abs().max() / expected.detach().abs().max()) < 0.1
    )


@pytest.mark.parametrize("family", [f for f in HF_FAMILIES if f not in CLASSIFIERS])
def test_a_tied_model_is_saved_with_a_head_of_its_own(family, tmp_path):
    model = tiny(family, tie_word_embeddings=True)
    retrofit(model, paper())
    randomize_(model).save_pretrained(tmp_path)
    loaded = auto_class(family).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is not loaded.get_input_embeddings().weight
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


@hf_family
def test_kept_norms_are_saved_and_loaded(family, tmp_path):
    model, ids, expected = saved(family, tmp_path, paper(norms="keep"))
    loaded, info = auto_class(family).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits_of(loaded, ids), expected)
    assert find_retrofit(loaded)[1].config.norms == "keep"
    assert list(loaded.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_loaded_model_trains_on_with_the_lone_callback(family, tmp_path):
    _, ids, expected = saved(family, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    data = [
        {"input_ids": [(s + t) % 7 for t in range(12)], "labels": [(s + t) % 7 for t in range(12)]}
        for s in range(8)
    ]
    args = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=6,
        logging_steps=2,
        save_steps=6,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(loaded, args, train_dataset=data, callbacks=[LipschitzCallback()])
    assert torch.equal(
        logits_of(loaded, ids), expected
    )  # no fresh init, whatever _name_or_path says
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), LipschitzMuon)
    assert (
        find_retrofit(loaded)[1].config
        == find_retrofit(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))[1].config
    )
    assert worst_over_cap(loaded) <= 1.0 + CAP_TOLERANCE
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-6")
    assert torch.equal(logits_of(again, ids), logits_of(loaded.eval(), ids))


def test_a_released_model_is_saved_and_loaded_with_its_function(tmp_path):
    model, ids, expected = saved("gpt2", tmp_path / "1")
    release(model)
    model.save_pretrained(tmp_path / "2")
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "2"), ids), expected
    )


def test_generation_settings_survive(tmp_path):
    model, _, _ = saved("llama", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randint(67, (1, 4))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options["attention_mask"] = torch.ones_like(x)
    assert torch.equal(loaded.generate(x, **options), model.generate(x, **options))


def test_a_plain_model_loads_as_ever_once_the_plugin_is_imported(tmp_path):
    model = randomize_(tiny("llama"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    x = torch.randint(67, (2, 9))
    assert torch.equal(logits_of(loaded, x), logits_of(model, x))
    assert find_retrofit(loaded) is None
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_two_models_do_not_share_their_marks(tmp_path):
    """Retrofitting one model leaves another of the same class and the same config class alone."""
    config = tiny("gpt2").config
    plain_keys = set(config.to_dict())
    saved("gpt2", tmp_path)
    other = tiny("gpt2")
    assert set(other.config.to_dict()) == plain_keys
    assert find_retrofit(other) is None
    assert other.config.activation_function == "gelu_new"


@pytest.mark.parametrize("change", ["unknown key", "bad cap", "not a mapping", "empty", "missing"])
def test_a_config_that_was_edited_badly_is_refused(change, tmp_path):
    saved("llama", tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    lipschitz = values["quantization_config"]["lipschitz"]
    if change == "unknown key":
        lipschitz["from_the_future"] = 1
    elif change == "bad cap":
        lipschitz["w_max"] = -1.0
    elif change == "missing":  # must not pass for the default config: its constants may be others
        del values["quantization_config"]["lipschitz"]
    else:
        values["quantization_config"]["lipschitz"] = [1, 2] if change == "not a mapping" else []
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"from_the_future|w_max|mapping"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_from_config_of_a_saved_model_gives_no_silent_half(tmp_path):
    """from_config of a saved model fails, because it does not apply the retrofit.

    The model that it builds must not pass for a constrained one.
    """
    saved("gpt2", tmp_path)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert find_retrofit(model) is None
    with pytest.raises(
        ConfigError, match="from scratch"
    ):  # its config came from a folder of weights
        retrofit(model, paper())
    retrofit(model, paper(norms="remove", init="orthogonal", w_max=1.7))
    assert worst_over_cap(model) <= 1.0
