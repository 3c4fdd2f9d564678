"""Bad input gets an error that says what to mend, and never a number.

Each case is a good input that is broken once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lip_plugin import Certificate, certify, project_, retrofit
from lip_plugin.certificate.fingerprint import Fingerprint, fingerprint
from lip_plugin.cli.main import BAD_INPUT, OK, UNSUPPORTED, USAGE, main
from lip_plugin.errors import (
    CertificateError,
    CheckpointError,
    NonFiniteError,
    UnsupportedModelError,
)
from lip_plugin.integrations.huggingface.loading import certify_streamed, load_saved_model
from lip_plugin.integrations.huggingface.metrics import write_certificate
from lip_plugin.stated import _digest
from tests.support.families import HF_FAMILIES, tiny
from tests.support.oracles import paper, randomize_

hf_family = pytest.mark.parametrize("family", HF_FAMILIES)


def make(family, folder, norms="remove", certificate=True):
    """A saved model with its certificate beside it, as a Trainer's checkpoint has."""
    model = tiny(family)
    if norms is not None:
        retrofit(model, paper(norms=norms))
    randomize_(model)
    if norms == "remove":
        project_(model)
    model.save_pretrained(folder)
    if certificate:
        write_certificate(model, folder)
    return model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """One good folder for each of two families."""
    root = tmp_path_factory.mktemp("good")
    for family in ("gpt2", "llama"):
        make(family, root / family)
    return root


@pytest.fixture
def folder(good, tmp_path):
    """A copy of the llama's, free to be broken."""
    return shutil.copytree(good / "llama", tmp_path / "model")


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def refused(path, code, capsys, *words, command="certify"):
    """The command line gives this exit code, and no number on stdout.

    It writes one line on stderr, which holds these words.
    """
    capsys.readouterr()  # what saving wrote
    assert main([command, str(path)]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err
    return said.err


@hf_family
def test_what_is_broken_below_is_good_as_it_is(family, tmp_path, capsys):
    for norms in ("remove", "keep", None):
        make(family, tmp_path / str(norms), norms)
        assert main(["certify", str(tmp_path / str(norms))]) == OK
        assert "is reproduced" in capsys.readouterr().out
        assert main(["certify", "--stream", str(tmp_path / str(norms))]) == OK
        assert "is reproduced" in capsys.readouterr().out


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_of_weights(share, folder, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(folder, BAD_INPUT, capsys, "model.safetensors", "truncated")
    with pytest.raises(CheckpointError):
        certify_streamed(folder)


def test_a_missing_and_a_truncated_shard(folder, capsys):
    load_saved_model(folder).save_pretrained(folder, max_shard_size="8KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert main(["certify", str(folder)]) == OK
    capsys.readouterr()
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    refused(folder, BAD_INPUT, capsys, shard.name, "truncated")
    shard.unlink()
    refused(folder, BAD_INPUT, capsys, shard.name, "missing")
    (folder / "model.safetensors.index.json").write_text("{}")
    refused(folder, BAD_INPUT, capsys, "weight_map")


def test_one_flipped_bit_after_saving(folder, capsys):
    """In the last byte of the file, so in the values and not in the header."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    refused(folder, BAD_INPUT, capsys, "other weights", "--renew")
    refused(folder, BAD_INPUT, capsys, "other weights", command="falsify")
    refused(folder, BAD_INPUT, capsys, "other weights", command="report")
    assert main(["certify", "--stream", str(folder)]) == BAD_INPUT
    assert main(["certify", "--renew", str(folder)]) == OK  # the cure that was named
    assert main(["certify", str(folder)]) == OK


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_with_nan_and_inf(value, name, folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, BAD_INPUT, capsys, name, "nan or inf")
    for source in ("weights", "caps"):
        with pytest.raises(NonFiniteError, match=name):
            certify_streamed(folder, source)


# Each leaves every shape as it is (two kv heads of 8: 4 heads of 4 would not fit, other counts do).
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 2),
        ("hidden_act", "lip_plugin:gelu"),
        ("hidden_act", "lip_plugin:relu"),
        ("rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("rms_norm_eps", 0.5),
    ],
)
@pytest.mark.parametrize("certificate", [True, False], ids=["beside", "alone"])
def test_a_config_that_was_edited_without_touching_a_shape(
    field, value, certificate, folder, capsys
):
    """Without a certificate beside it, the retrofit that config.json records still tells."""
    changes = {field: value}
    if field == "num_attention_heads":
        changes |= {
            "head_dim": 16,
            "num_key_value_heads": 1,
        }  # rows of q, k and v are as many as before
    edit_json(folder / "config.json", **changes)
    if not certificate:
        (folder / "certificate.json").unlink()
    refused(folder, BAD_INPUT, capsys, field)
    with pytest.raises(CheckpointError, match=field):
        certify_streamed(folder)


def test_an_edited_config_of_a_plain_model_is_told_by_the_certificate_beside_it(tmp_path, capsys):
    make("gpt2", tmp_path, norms=None)
    edit_json(tmp_path / "config.json", n_head=2)
    message = refused(tmp_path, BAD_INPUT, capsys, "n_head is 2 and was 4")
    assert "--renew" in message
    assert main(["certify", "--stream", str(tmp_path)]) == BAD_INPUT


def test_an_edited_retrofit_is_told_by_its_record(folder, capsys):
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["lipschitz"]["attention_scale"] = 0.5
    (folder / "config.json").write_text(json.dumps(values))
    refused(folder, BAD_INPUT, capsys, "attention_scale is 0.5 and was 1.0")
    values["quantization_config"]["lipschitz"]["w_max"] = -1
    (folder / "config.json").write_text(json.dumps(values))
    refused(folder, BAD_INPUT, capsys, "w_max")


def test_layers_and_tensors_that_are_missing_or_too_many(folder, capsys):
    whole = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", num_hidden_layers=1, layer_types=None)
    refused(folder, BAD_INPUT, capsys, "unexpected", "model.layers.1.")
    edit_json(folder / "config.json", num_hidden_layers=3)
    refused(folder, BAD_INPUT, capsys, "missing", "model.layers.2.")
    (folder / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / "model.safetensors")
    gone = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, BAD_INPUT, capsys, "1 missing (lm_head.weight)")
    tensors |= {"lm_head.weight": gone, "model.extra.weight": gone.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, BAD_INPUT, capsys, "1 unexpected (model.extra.weight)")
    del tensors["model.extra.weight"]
    tensors["lm_head.weight"] = gone[:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, BAD_INPUT, capsys, "lm_head.weight is [66, 32]")


def test_folders_that_hold_no_model(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", BAD_INPUT, capsys, "nowhere")
    refused(tmp_path / "empty", BAD_INPUT, capsys, "no config.json")
    refused(folder / "model.safetensors", BAD_INPUT, capsys, "folder around it")
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    shutil.copy(folder / "config.json", tmp_path / "run" / "checkpoint-5")
    refused(tmp_path / "run", BAD_INPUT, capsys, "checkpoint-5")
    refused(tmp_path / "run" / "checkpoint-5", BAD_INPUT, capsys, "no model.safetensors")
    refused(tmp_path / "empty", BAD_INPUT, capsys, "no model", command="report")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"model_type": 3}', "\x00\x01"])
def test_a_config_that_is_none(text, folder, capsys):
    (folder / "config.json").write_text(text)
    refused(folder, BAD_INPUT, capsys, "config.json")


def test_models_that_have_no_rule_are_not_bad_input(folder, capsys):
    edit_json(folder / "config.json", model_type="something_new")
    refused(folder, UNSUPPORTED, capsys, "something_new")
    edit_json(folder / "config.json", model_type="llama", architectures=["MyOwn"])
    refused(folder, UNSUPPORTED, capsys, "MyOwn")
    edit_json(folder / "config.json", architectures=["LlamaModel"])
    refused(folder, UNSUPPORTED, capsys, "LlamaModel")
    edit_json(folder / "config.json", architectures=["GPT2LMHeadModel"])
    refused(folder, BAD_INPUT, capsys, "GPT2LMHeadModel")


def test_a_model_without_caps_has_no_certificate_from_caps(tmp_path, capsys):
    make("gpt2", tmp_path, norms=None, certificate=False)
    assert main(["certify", "--source", "caps", str(tmp_path)]) == UNSUPPORTED
    assert "no cap" in capsys.readouterr().err


def resealed(certificate: Certificate, **changes) -> str:
    """An edited certificate whose digest fits, as a careful forger would write it."""
    outer = json.loads(certificate.to_json())
    outer["certificate"].update(changes)
    outer["digest"] = _digest(outer["certificate"])
    return json.dumps(outer)


def test_an_edited_certificate(folder, capsys):
    path = folder / "certificate.json"
    text = path.read_text()
    certificate = Certificate.from_json(text)
    path.write_text(text.replace(repr(certificate.lipschitz), "1.5"))
    refused(folder, BAD_INPUT, capsys, "certificate.json", "edited")
    refused(path, BAD_INPUT, capsys, "edited")
    path.write_text(text[:-20])
    refused(folder, BAD_INPUT, capsys, "not JSON")
    for changes in (
        {"lipschitz": certificate.lipschitz / 2},
        {"log10_lipschitz": certificate.log10_lipschitz - 0.3},
        {"lipschitz": 0.0, "log10_lipschitz": "-inf"},
        {"attention_logit": certificate.attention_logit / 2},
        {"radius": certificate.radius / 2},
    ):
        path.write_text(resealed(certificate, **changes))
        refused(folder, BAD_INPUT, capsys, "can be proven")
    path.write_text(json.dumps({**json.loads(text), "format": "lip_plugin.certificate/1"}))
    refused(folder, BAD_INPUT, capsys, "format 1", "which weights")


@pytest.mark.parametrize(
    "arguments", [[], ["certify"], ["prove", "x"], ["falsify", "x", "--rounds", "0"]]
)
def test_wrong_usage_is_exit_code_one(arguments, capsys):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == USAGE
    assert capsys.readouterr().out == ""


def test_a_claim_that_is_none(folder, capsys):
    for claim in ("-1", "nan"):
        assert main(["falsify", "--claim", claim, str(folder)]) == USAGE
        assert "--claim" in capsys.readouterr().err


class TestBelongs:
    """Whose certificate is it."""

    def test_the_same_bits_have_the_same_fingerprint_wherever_they_are(self, tmp_path):
        model = make("gpt2", tmp_path, certificate=False)
        loaded = load_saved_model(tmp_path)
        assert fingerprint(model) == fingerprint(loaded) == certify_streamed(tmp_path).weights
        certify(model).verify(loaded)
        certify(model, "caps").verify(loaded)
        assert fingerprint(model) == fingerprint(torch.nn.parallel.DataParallel(loaded).module)

    def test_any_change_changes_it(self):
        model = tiny("gpt2", tie_word_embeddings=True)
        seen = {fingerprint(model)}
        weight = model.transformer.h[1].attn.c_proj.weight
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
            seen.add(fingerprint(model))
            model.transformer.h[1].ln_1.bias[3] = -0.0  # another bit, the same number
            seen.add(fingerprint(model))
        seen |= {fingerprint(model.to(torch.bfloat16)), fingerprint(model.to(torch.float32))}
        assert len(seen) == 5

    def test_names_shapes_and_dtypes_count_and_order_does_not(self):
        def of(*entries):
            found = Fingerprint()
            for name, tensor in entries:
                found.add(name, tensor)
            return found.value()

        zeros = torch.zeros(2, 6)
        values = [
            of(("a", zeros)),
            of(("b", zeros)),
            of(("a", zeros.reshape(3, 4))),
            of(("a", zeros.int())),
            of(("a", zeros), ("b", zeros)),
            of(),
            of(("a", torch.zeros(0, 6))),
        ]
        assert len(set(values)) == len(values)
        assert of(("a", zeros), ("b", torch.ones(3))) == of(("b", torch.ones(3)), ("a", zeros))
        matrix = torch.arange(6.0).reshape(2, 3)
        assert of(("a", matrix.t().contiguous().t())) == of(
            ("a", matrix)
        )  # memory layout is not value

    def test_other_weights_other_settings_and_no_fingerprint_are_refused(self):
        model = retrofitted()
        certificate = certify(model)
        certificate.verify(model)
        model.transformer.h[0].mlp.c_fc.bias.data[0] += 1e-7
        with pytest.raises(CertificateError, match="other weights"):
            certificate.verify(model)
        model.transformer.h[0].mlp.c_fc.bias.data[0] = 0.0
        model.config.n_positions = 128
        with pytest.raises(CertificateError, match="n_positions is 128 and was 64"):
            certificate.verify(model)

    def test_an_option_that_is_newer_than_the_certificate_must_be_at_its_default(self):
        """A certificate from before there was an option is refused where the option is used.

        gate_max changes the function and no weight.
        """

        def llama(**config):
            torch.manual_seed(0)
            model = tiny("llama")
            retrofit(model, paper(**config))
            return model

        certificate = certify(llama())
        settings = {k: v for k, v in certificate.settings["lipschitz"].items() if k != "gate_max"}
        older = replace(certificate, settings={**certificate.settings, "lipschitz": settings})
        older.verify(llama())
        with pytest.raises(CertificateError, match="gate_max is 4.0 and was None"):
            older.verify(llama(gate_max=4.0))

    def test_a_retrofit_after_the_certificate_is_another_model(self):
        """A model that was retrofitted after its certificate is another model.

        Norms and weights are kept, so that bytes and config are the same. But gates are capped.
        """
        model = tiny("llama")
        certificate = certify(model)
        retrofit(model, paper(norms="keep", init="keep", w_max=100.0, gate_max=4.0))
        with pytest.raises(CertificateError, match="other settings: lipschitz is"):
            certificate.verify(model)

    def test_one_from_caps_outlives_a_step_of_capped_weights_and_no_other(self):
        model = retrofitted()
        caps = certify(model, "caps")
        for name, p in model.named_parameters():
            if name.endswith("weight"):
                p.data.mul_(0.7)
        caps.verify(model)
        assert caps.weights == certify(model, "caps").weights != certify(model).weights
        model.transformer.h[1].mlp.c_fc.weight.data.mul_(10.0)
        with pytest.raises(CertificateError, match="times its cap"):
            caps.verify(model)
        project_(model)
        caps.verify(model)
        model.transformer.h[0].mlp.c_fc.bias.data[0] += (
            1.0  # a bias has no cap: it is in the bound as it is
        )
        with pytest.raises(CertificateError, match="other caps, biases or structure"):
            caps.verify(model)
        other = retrofitted(w_max=1.5)
        with pytest.raises(CertificateError, match="w_max"):
            caps.verify(other)

    def test_one_from_caps_counts_every_capped_weight_by_its_cap_bare_tables_included(self):
        """Those of vit's class token and positions are Parameters of their own, not layers."""
        model = tiny("vit")
        retrofit(model, paper(biases="drop"))
        caps = certify(model, "caps")
        moved = [name for name, p in model.named_parameters() if p.requires_grad]
        assert {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"} <= set(moved)
        for name, p in model.named_parameters():
            if name in moved:
                p.data.mul_(0.7)
        caps.verify(model)

    def test_a_model_without_values_has_no_fingerprint(self):
        with torch.device("meta"):
            model = torch.nn.Linear(2, 2)
        with pytest.raises(UnsupportedModelError, match="without values"):
            fingerprint(model)


def retrofitted(**config):
    model = tiny("gpt2")
    retrofit(model, paper(**config))
    project_(randomize_(model))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            p.data.zero_()
    return model
