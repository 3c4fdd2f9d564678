"""A saved model tells a process without the plugin to import it.

Folders with the old names still load.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lip_plugin import Certificate, calibrate, certify, project_, retrofit
from lip_plugin.errors import CheckpointError
from lip_plugin.integrations.huggingface.loading import certify_streamed, load_saved_model
from lip_plugin.integrations.huggingface.metrics import write_certificate
from lip_plugin.model.saved_names import CALIBRATED, METHOD, SCALED, plain_name, recorded
from lip_plugin.surgery.state import find_retrofit
from tests.integrations.test_saving import python
from tests.support.families import inputs_for, tiny
from tests.support.oracles import logits_of, paper, randomize_

LOAD = """
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained({path!r})
print("LOADED", type(model).__name__)
"""
BEFORE = {METHOD: "lip_plugin", SCALED: "lip_plugin:", CALIBRATED: "lip_plugin.calibrated:"}


def saved(folder: Path, family: str = "gpt2", norms: str = "remove"):
    """A model with trained-like weights, saved with its certificate beside it."""
    model = tiny(family)
    floors = {}
    if norms == "calibrated":
        randomize_(model)
        floors = calibrate(model, [inputs_for(family)])
    retrofit(model, paper(norms=norms, norm_floors=floors))
    if norms == "remove":
        randomize_(model)
    project_(model)
    model.save_pretrained(folder)
    write_certificate(model, folder)
    return model


def as_before(folder: Path) -> None:
    """Rename in config.json, as the plugin wrote it before the names said what to do."""
    path = folder / "config.json"
    text = path.read_text()
    for now, then in BEFORE.items():
        text = text.replace(json.dumps(now)[1:-1], then)
    path.write_text(text)
    assert "import lip_plugin" not in text


@pytest.mark.parametrize("norms", ["remove", "calibrated"])
def test_without_the_plugin_nothing_loads_and_all_that_is_said_is_to_import_it(norms, tmp_path):
    saved(tmp_path, norms=norms)
    alone = python(LOAD.format(path=str(tmp_path)))
    assert alone.returncode != 0
    assert "LOADED" not in alone.stdout
    assert (
        "import lip_plugin" in alone.stderr.strip().splitlines()[-1]
    )  # what the error itself says
    warned = [line for line in alone.stderr.splitlines() if "Unknown quantization type" in line]
    assert warned
    assert all(
        "import lip_plugin" in line and "leave config.json as it is" in line for line in warned
    )
    followed = python("import lip_plugin\n" + LOAD.format(path=str(tmp_path)))
    assert followed.returncode == 0, followed.stderr
    assert "LOADED GPT2LMHeadModel" in followed.stdout


def test_with_kept_norms_it_loads_as_a_plain_model_and_the_warning_says_what_to_import(tmp_path):
    saved(tmp_path, norms="keep")
    alone = python(LOAD.format(path=str(tmp_path)))
    assert "LOADED" in alone.stdout
    assert any(
        "Unknown quantization" in s and "import lip_plugin" in s for s in alone.stderr.splitlines()
    )


def test_a_config_alone_says_what_to_import_too(tmp_path):
    saved(tmp_path)
    code = (
        "import transformers as t\n"
        "t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained({!r}))"
    )
    alone = python(code.format(str(tmp_path)))
    assert "import lip_plugin" in alone.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("norms", ["remove", "calibrated", "keep"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_folder_with_the_names_of_before_is_the_same_model_with_the_same_certificate(
    family, norms, tmp_path
):
    model = saved(tmp_path, family, norms)
    ids, stated = inputs_for(family), certify(model)
    as_before(tmp_path)
    old = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(old, ids), logits_of(model, ids))
    assert find_retrofit(old)[1].config == find_retrofit(model)[1].config
    assert certify(old) == stated == certify_streamed(tmp_path)
    assert certify(old).settings == stated.settings
    beside = Certificate.from_json((tmp_path / "certificate.json").read_text())
    beside.verify(old)
    beside.verify(load_saved_model(tmp_path))
    old.save_pretrained(tmp_path / "again")  # under the names of now
    text = (tmp_path / "again" / "config.json").read_text()
    assert json.loads(text)["quantization_config"]["quant_method"] == METHOD
    beside.verify(load_saved_model(tmp_path / "again"))


def test_settings_record_activations_as_they_did_before(tmp_path):
    """So a certificate from before fits a model that was saved since, and the other way round."""
    model = saved(tmp_path)
    assert model.config.activation_function == SCALED + "gelu_new"
    assert certify(model).settings["activation_function"] == "lip_plugin:gelu_new"
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"]["settings"]["activation_function"] == "lip_plugin:gelu_new"
    assert recorded(CALIBRATED + "silu") == "lip_plugin.calibrated:silu"
    assert recorded("silu") == "silu"
    assert recorded(3) == 3


@pytest.mark.parametrize("renamed", [False, True])
def test_an_edited_activation_is_noticed_under_either_name(renamed, tmp_path):
    saved(tmp_path)
    if renamed:
        as_before(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values["activation_function"] = values["activation_function"].replace("gelu_new", "gelu")
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="activation_function is 'lip_plugin:gelu' and was"):
        load_saved_model(tmp_path)


def test_names_are_put_in_front_once_however_often_a_model_is_retrofitted(tmp_path):
    saved(tmp_path)
    as_before(tmp_path)
    skeleton = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert skeleton.config.activation_function == "lip_plugin:gelu_new"
    retrofit(skeleton, paper(norms="remove"))
    assert skeleton.config.activation_function == SCALED + "gelu_new"
    for prefix in (*BEFORE, *BEFORE.values()):
        if prefix.endswith(":"):
            assert plain_name(prefix + "gelu_new") == "gelu_new"
