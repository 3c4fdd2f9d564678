"""What users get wrong first is told in plain words.

There are slips in arguments, things that are no config or model, and states of other runs.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import Trainer

from lip_plugin import (
    LipschitzCallback,
    LipschitzConfig,
    LipschitzMuon,
    RetrofitSchedule,
    calibrate,
    certify,
    constrain_adapters,
    load_checkpoint,
    own_caps,
    plan_caps,
    release,
    retrofit,
    save_checkpoint,
    set_caps_,
)
from lip_plugin.errors import CheckpointError, ConfigError, TrainerError, UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.surgery.state import find_retrofit
from tests.integrations.test_trainer import SMALL, arguments, trainer_of
from tests.support.families import data_for, tiny
from tests.support.oracles import assert_unchanged, fingerprint, paper


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("robst", "Did you mean 'robust'"),
        ({"w_max": 2.0}, "from_dict"),
        (LipschitzConfig, "LipschitzConfig()"),
        (torch.nn.Linear(2, 2), "is a model"),
        (2.0, "LipschitzConfig, or the name of a preset"),
        (0, "LipschitzConfig, or the name of a preset"),
    ],
    ids=lambda v: repr(v)[:12],
)
def test_what_is_no_config_is_refused_everywhere_with_what_to_pass(config: Any, words: str) -> None:
    model = tiny("gpt2")
    before = fingerprint(model)
    for call in (
        lambda: retrofit(model, config),
        lambda: plan_caps(model, 10.0, config),
        lambda: LipschitzCallback(config),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            call()
    assert_unchanged(model, before)


def test_a_report_is_no_config_and_another_config_is_told_field_by_field() -> None:
    model = tiny("gpt2")
    report = retrofit(model, LipschitzConfig(w_max=2.5))
    for call in (lambda: retrofit(model, report), lambda: LipschitzCallback(report)):
        with pytest.raises(ConfigError, match=r"report that retrofit\(\) gave back"):
            call()
    with pytest.raises(ConfigError, match=r"another config: it has w_max=2.5\. Call release"):
        retrofit(model, LipschitzConfig())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"w_max": 2},
            "w_max is a field of LipschitzConfig: LipschitzCallback(LipschitzConfig(w_max=2))",
        ),
        ({"config": "robust", "w_max": 2}, "LipschitzConfig.preset('robust', w_max=2)"),
        ({"confg": 3}, "no argument 'confg'. Did you mean 'config'"),
        ({"momentun": 0.9}, "Did you mean 'momentum'"),
        ({"params": []}, "no argument 'params'"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, "optimizers=(optimizer, None)"),
        ({"lr": -1}, "lr=-1"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": True}, "lr=True"),
        ({"adamw_lr": 0}, "adamw_lr=0"),
        ({"adamw_lr": "x"}, "adamw_lr='x'"),
        ({"adapter_lr": float("nan")}, "adapter_lr=nan"),
        ({"momentum": 1.0}, "momentum must lie in [0, 1)"),
        ({"momentum": "x"}, "momentum='x'"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": 0.0}, "eps=0.0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"precision": "float16"}, "float16"),
        ({"probe_tokens": 0}, "probe_tokens=0"),
        ({"schedule": RetrofitSchedule}, "RetrofitSchedule()"),
        ({"schedule": "cosine"}, "scheduler of learning rates"),
        ({"calibration": "data"}, "calibration="),
        ({"calibration": 3}, "calibration=3"),
        ({"adapter_budget": -0.1}, "adapter_budget=-0.1"),
    ],
    ids=lambda v: repr(v)[:30],
)
def test_a_slip_in_the_callbacks_arguments_is_refused_where_it_is_made(
    given: dict, words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        LipschitzCallback(**given)


def test_every_argument_of_muon_that_means_something_here_passes() -> None:
    options = {
        "embedding_lr": 0.1,
        "adamw_lr": 1e-3,
        "adapter_lr": None,
        "momentum": 0.0,
        "weight_decay": 0.1,
    }
    options |= {
        "betas": (0.9, 0.95),
        "eps": 1e-9,
        "adamw_weight_decay": 0.0,
        "steps": 4,
        "precision": "float32",
    }
    assert LipschitzCallback(**options).muon == options


def test_a_second_callback_and_one_that_comes_too_late_are_refused_with_the_cure(tmp_path) -> None:
    two = [LipschitzCallback(), LipschitzCallback()]
    with pytest.raises(TrainerError, match=r"LipschitzCallback already.*Keep one"):
        Trainer(
            tiny("gpt2", **SMALL),
            arguments(tmp_path),
            train_dataset=data_for("gpt2"),
            callbacks=two,
        )
    late = Trainer(tiny("gpt2", **SMALL), arguments(tmp_path), train_dataset=data_for("gpt2"))
    late.add_callback(LipschitzCallback())
    with pytest.raises(TrainerError, match=r"too late.*callbacks=\[LipschitzCallback\(\)\]"):
        late.train()


def test_the_class_itself_and_arguments_used_twice_are_no_mistake(tmp_path) -> None:
    args = arguments(tmp_path, max_steps=1)
    for _ in range(2):
        model = tiny("gpt2", **SMALL)
        Trainer(model, args, train_dataset=data_for("gpt2"), callbacks=[LipschitzCallback])
        assert find_retrofit(model) is not None


NO_MODELS: dict[str, tuple[Any, str]] = {
    "report": (
        retrofit(tiny("gpt2")),
        r"retrofit\(\) changes the model in place and gives a report back",
    ),
    "path": ("runs/model", "lip-plugin certify runs/model"),
    "number": (5, "of type int"),
    "config": (LipschitzConfig(), "The model comes first"),
    "optimizer": (torch.optim.SGD([torch.zeros(1)]), "is an optimizer"),
    "class": (torch.nn.Linear, "Build the model first"),
    "state_dict": ({"weight": torch.zeros(1)}, "load_state_dict"),
}
CALLS = {
    "certify": certify,
    "retrofit": retrofit,
    "release": release,
    "calibrate": lambda x: calibrate(x, []),
    "own_caps": own_caps,
    "plan_caps": lambda x: plan_caps(x, 10.0),
    "save_checkpoint": lambda x: save_checkpoint("nowhere", 1, x, None),
    "load_checkpoint": lambda x: load_checkpoint("nowhere", x, None),
    "set_caps_": lambda x: set_caps_(x, None, w_max=1.0),
    "constrain_adapters": lambda x: constrain_adapters(x, 0.1),
}


@pytest.mark.parametrize("kind", NO_MODELS)
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model_is_refused_with_what_to_pass(call: str, kind: str) -> None:
    given, words = NO_MODELS[kind]
    with pytest.raises(ConfigError, match=f"{call} takes the model: .*{words}"):
        CALLS[call](given)


def test_an_optimizer_of_a_report_is_refused_in_the_same_words() -> None:
    with pytest.raises(ConfigError, match=NO_MODELS["report"][1]):
        LipschitzMuon(NO_MODELS["report"][0])


def test_a_trainer_is_no_model_but_has_one(tmp_path) -> None:
    trainer = trainer_of(tmp_path, tiny("gpt2", **SMALL))
    with pytest.raises(ConfigError, match=r"Pass the model inside it: trainer\.model"):
        certify(trainer)
    require_module(trainer.model, "certify")  # says nothing


def test_steps_and_batches_of_another_type_are_refused() -> None:
    model = tiny("gpt2")
    retrofit(model)
    with pytest.raises(ConfigError, match="step="):
        save_checkpoint("nowhere", model, model, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="batches are of type int"):
        calibrate(tiny("gpt2"), 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"goes from a pretrained model to .*'robust'"):
        RetrofitSchedule().begin_(tiny("gpt2"), "robust")  # type: ignore[arg-type]


def test_a_state_of_another_config_is_refused_with_both_and_the_cure_before_anything_changes() -> (
    None
):
    models = [tiny("gpt2"), tiny("gpt2")]
    retrofit(models[0], paper())
    retrofit(models[1], paper(biases="drop"))
    old, optimizer = (LipschitzMuon(model, lr=0.1) for model in models)
    rates = [g["lr"] for g in optimizer.param_groups]
    state = old.state_dict()
    state["param_groups"][0]["lr"] = 0.7
    kinds = ", ".join(f"{g['kind']}: {len(g['params'])}" for g in old.param_groups)
    assert "adamw" in kinds
    assert "adamw" not in {g["kind"] for g in optimizer.param_groups}
    with pytest.raises(
        CheckpointError, match=re.escape(kinds) + r".*another LipschitzConfig.*config\.json"
    ):
        optimizer.load_state_dict(state)
    assert [g["lr"] for g in optimizer.param_groups] == rates
    plain = torch.optim.AdamW([p for p in models[1].parameters() if p.requires_grad])
    with pytest.raises(CheckpointError, match="another optimizer"):
        optimizer.load_state_dict(plain.state_dict())


def test_a_trainer_that_resumes_with_another_config_says_so(tmp_path) -> None:
    fields = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, tiny("gpt2", **SMALL), **fields).train()
    other = trainer_of(tmp_path, tiny("gpt2", **SMALL), LipschitzCallback("paper"), **fields)
    with pytest.raises(CheckpointError, match="another LipschitzConfig"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_quantized_base_is_sent_to_constrain_adapters() -> None:
    model = tiny("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False
    )
    coded = tiny("llama")
    coded.model.layers[0].mlp.up_proj = type("Coded", (torch.nn.Linear,), {})(32, 48, bias=False)
    cure = r"constrain_adapters\(model, budget=0.1, relative=True\)"
    for base in (model, coded):
        with pytest.raises(UnsupportedModelError, match=cure):
            retrofit(base)


def test_names_and_numbers_of_a_config_are_told_with_what_is_right() -> None:
    with pytest.raises(ConfigError, match="between 0 and 1, or a pair"):
        LipschitzConfig(residual="x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Did you mean 'mlp\.c_fc'"):
        retrofit(tiny("gpt2"), LipschitzConfig(overrides={"mlp.cfc": 2.0}))
    with pytest.raises(ConfigError, match="w_min; it has .*w_max"):
        LipschitzConfig.preset("robust", w_min=1.0)
