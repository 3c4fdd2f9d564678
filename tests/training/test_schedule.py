"""Under a RetrofitSchedule norms go and caps tighten while a pretrained model trains.

It works in a loop, through the callback, and resumed.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from lip_plugin import (
    LipschitzCallback,
    LipschitzConfig,
    LipschitzMuon,
    RetrofitSchedule,
    attach_projection,
    certify,
    config_of,
    own_caps,
    retrofit,
)
from lip_plugin.errors import ConfigError, TrainerError
from lip_plugin.integrations.huggingface.metrics import _steepest_norm
from lip_plugin.model.layers import constrained_modules
from lip_plugin.surgery.block_norms import block_norms
from lip_plugin.surgery.state import find_retrofit
from lip_plugin.training.calibration import with_floors
from tests.support.families import data_for, inputs_for, tiny
from tests.support.oracles import paper
from tests.support.pretrained_models import lively, logits

TARGET = paper(norms="calibrated", w_max=0.4, embedding_max=0.4, method="hard_cap")


def batches() -> list[torch.Tensor]:
    return [torch.arange(48).reshape(4, 12) % 67]


def test_floors_rise_together_and_all_are_up_at_the_end() -> None:
    schedule, end = RetrofitSchedule(norms=(0.2, 0.6)), {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    for progress in (0.0, 0.2):
        assert schedule.floors_at(end, progress) == dict.fromkeys(end, 0.0)
    for progress in (0.6, 0.9, 1.0):
        assert schedule.floors_at(end, progress) == end
    assert schedule.floors_at(end, 0.3) == pytest.approx({k: v / 4 for k, v in end.items()})
    steps = [sum(schedule.floors_at(end, i / 100).values()) for i in range(101)]
    assert steps == sorted(steps)


def test_caps_go_geometrically_from_the_weights_own_norms_to_the_target() -> None:
    schedule = RetrofitSchedule(caps=(0.5, 1.0))
    start, end = {"wide": 16.0, "narrow": 0.5}, {"wide": 1.0, "narrow": 1.0, "zero": 1.0}
    assert schedule.caps_at(start, end, 0.0) == {"wide": 16.0, "narrow": 1.0, "zero": 1.0}
    assert schedule.caps_at(start, end, 0.75)["wide"] == pytest.approx(4.0)
    assert schedule.caps_at(start, end, 1.0) == end


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "bert", "olmo2"])
def test_a_loop_goes_from_the_pretrained_model_to_its_target(family: str) -> None:
    model, ids = lively(family), inputs_for(family)
    before, weights = logits(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    schedule = RetrofitSchedule(norms=(0.0, 0.5), caps=(0.0, 0.75))
    schedule.begin_(model, TARGET, batches())
    assert torch.equal(before, logits(model, ids)), "at the start it is the pretrained model"
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items() if k in weights)
    optimizer = LipschitzMuon(model, lr=0.02)
    started = max(own_caps(model).values())
    assert started > 0.6
    for step in range(8):
        schedule.apply_(model, optimizer, step / 8)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        caps = {n: m.layout.segments[0].cap for n, m in constrained_modules(model)}
        assert max(b.worst_over_cap for b in block_norms(model)) <= 1 + 1e-3, caps
    schedule.apply_(model, optimizer, 1.0)
    assert max(own_caps(model).values()) <= 0.4 * (1 + 1e-3)
    config = config_of(model)
    assert (config.w_max, config.overrides) == (0.4, {})
    assert min(config.norm_floors.values()) > 0
    assert math.isfinite(certify(model, "caps").log10_lipschitz)


def test_norms_may_stay_while_caps_tighten() -> None:
    model = lively("gpt2")
    schedule = RetrofitSchedule(caps=(0.0, 1.0))
    schedule.begin_(model, paper(norms="keep", w_max=1.0))
    for progress in (0.3, 0.6, 1.0):
        schedule.apply_(model, None, progress)
    assert max(own_caps(model).values()) <= 1 + 1e-3


def test_bad_input() -> None:
    for wrong in (
        {"norms": (0.6, 0.2)},
        {"caps": (-0.1, 0.5)},
        {"caps": (0.0, 1.5)},
        {"every": 0},
    ):
        with pytest.raises(ConfigError):
            RetrofitSchedule(**wrong)
    schedule, model = RetrofitSchedule(), lively("gpt2")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match="calibration=batches"):
        schedule.begin_(model, TARGET)
    with pytest.raises(ConfigError, match="norms='calibrated'"):
        schedule.begin_(model, paper(norms="remove"), batches())
    typo = paper(norms="calibrated", overrides={"nothing": 1.0})
    with pytest.raises(ConfigError, match="'nothing'. matches no layer"):
        schedule.begin_(model, typo, batches())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    retrofit(model, paper(norms="keep"))
    with pytest.raises(ConfigError, match="call begin_"):
        schedule.apply_(model, None, 0.5)
    with pytest.raises(ConfigError, match="same pretrained weights.*resume_from_checkpoint"):
        schedule.begin_(model, TARGET, batches())


class Stop(TrainerCallback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            control.should_training_stop = True


def trainer(folder: Path, optim: str | None, stop: int = 99, **schedule: Any) -> Any:
    """A Trainer of the same pretrained model, under a schedule."""
    options: dict[str, Any] = {} if optim is None else {"optim": optim, "learning_rate": 1e-3}
    args = TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        logging_steps=3,
        save_steps=5,
        use_cpu=True,
        **options,
    )
    callback = LipschitzCallback(
        TARGET, schedule=RetrofitSchedule(every=2, **schedule), calibration=batches()
    )
    return Trainer(
        lively("gpt2"), args, train_dataset=data_for("gpt2"), callbacks=[callback, Stop(stop)]
    )


@pytest.mark.parametrize("optim", [None, "adamw_torch"])
def test_the_callback_carries_it_out_and_a_resumed_run_ends_where_the_other_does(
    optim: str | None, tmp_path: Path
) -> None:
    whole = trainer(tmp_path / "whole", optim)
    whole.train()
    log = [row for row in whole.state.log_history if "lip/steepest_norm" in row]
    steep = [row["lip/steepest_norm"] for row in log]
    assert steep == sorted(steep, reverse=True)
    assert steep[-1] < 0.5 * steep[0]
    assert log[0]["lip/largest_cap"] > log[-1]["lip/largest_cap"]
    assert max(row["lip/worst_norm_over_cap"] for row in log) <= 1 + 1e-3
    resumed = trainer(
        tmp_path / "resumed", optim
    )  # as if the first run had died after its fifth step
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for (name, a), b in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
    assert config_of(resumed.model) == config_of(whole.model)
    assert certify(resumed.model).log10_lipschitz == pytest.approx(
        certify(whole.model).log10_lipschitz, abs=1e-4
    )
    again = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-12")
    assert config_of(again).norms == "calibrated"


def test_the_last_checkpoint_is_the_end_of_the_schedule(tmp_path: Path) -> None:
    run = trainer(tmp_path, None, norms=(0.0, 1.0), caps=(0.0, 1.0))
    run.train()
    last = type(run.model).from_pretrained(tmp_path / "checkpoint-12")
    for model in (run.model, last):
        config = config_of(model)
        assert (config.w_max, config.overrides) == (0.4, {})
        assert min(config.norm_floors.values()) > 0
    assert torch.equal(logits(run.model, batches()[0]), logits(last, batches()[0]))
    assert run.state.log_history[-2]["lip/steepest_norm"] == _steepest_norm(
        *find_retrofit(run.model)
    )
    # a finished run that is started again stays where it was
    again = trainer(tmp_path, None, norms=(0.0, 1.0), caps=(0.0, 1.0))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert torch.equal(logits(run.model, batches()[0]), logits(again.model, batches()[0]))


def test_what_would_do_nothing_or_harm_is_refused(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}
    scheduled = {"schedule": RetrofitSchedule(), "calibration": batches()}
    adapted = get_peft_model(
        lively("gpt2"), LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True)
    )
    cases: list[tuple[Any, dict[str, Any], LipschitzConfig | None, dict[str, Any], str]] = [
        (lively("gpt2"), best, TARGET, scheduled, "load_best_model_at_end"),
        (adapted, {}, None, scheduled, "carries adapters"),
        (
            lively("gpt2"),
            {},
            paper(norms="keep"),
            {"calibration": batches()},
            "has no effect",
        ),
    ]
    for model, options, config, more, match in cases:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        args = TrainingArguments(str(tmp_path), use_cpu=True, **options)
        with pytest.raises((ConfigError, TrainerError), match=match):
            Trainer(
                model,
                args,
                train_dataset=data_for("gpt2"),
                eval_dataset=data_for("gpt2"),
                callbacks=[LipschitzCallback(config, **more)],
            )
        assert find_retrofit(model) is None
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_compiled_model_follows_the_floors() -> None:
    """torch compiles anew when floors leave 0, and takes every number above."""
    model, ids, compiles = lively("gpt2"), inputs_for("gpt2"), []
    schedule = RetrofitSchedule(norms=(0.0, 1.0), caps=(1.0, 1.0))
    schedule.begin_(model, TARGET, batches())

    def backend(graph: Any, inputs: Any) -> Any:
        compiles.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for step in range(8):
            schedule.apply_(model, None, step / 8)
            torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    assert len(compiles) <= 3


def test_a_model_in_mid_course_is_not_begun_again(tmp_path: Path) -> None:
    trainer(tmp_path, None, stop=5).train()
    model = type(tiny("gpt2")).from_pretrained(tmp_path / "checkpoint-5")
    callback = LipschitzCallback(TARGET, schedule=RetrofitSchedule(), calibration=batches())
    with pytest.raises(ConfigError, match="same pretrained weights"):
        Trainer(
            model,
            TrainingArguments(str(tmp_path), use_cpu=True),
            train_dataset=data_for("gpt2"),
            callbacks=[callback],
        )


def test_the_callback_calibrates_without_a_schedule(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, logging_steps=1)
    model = lively("gpt2")
    caps = own_caps(model)
    config = paper(norms="calibrated", overrides=caps)
    run = Trainer(
        model,
        args,
        train_dataset=data_for("gpt2"),
        callbacks=[LipschitzCallback(config, calibration=batches())],
    )
    run.train()
    assert (
        run.state.log_history[0]["lip/steepest_norm"] < 100
    )  # 316 times the largest gain without floors
    twin = copy.deepcopy(run.model)
    assert math.isfinite(certify(twin).log10_lipschitz)
    attach_projection(torch.optim.SGD(twin.parameters(), lr=0.1), twin)


def test_a_model_with_floors_keeps_them_when_it_is_trained_on() -> None:
    model = lively("gpt2")
    asked = paper(norms="calibrated", overrides=own_caps(model))
    retrofit(model, with_floors(model, asked, batches()))
    other = [torch.randint(67, (4, 12))]
    assert with_floors(model, asked, other).norm_floors == config_of(model).norm_floors
