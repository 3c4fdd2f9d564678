"""What a lone LipschitzCallback does to a Trainer run, and what it refuses."""

from __future__ import annotations

import ast
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    DefaultFlowCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from lip_plugin import (
    Certificate,
    LipschitzCallback,
    LipschitzMuon,
    certify,
    retrofit,
)
from lip_plugin.errors import ConfigError, LipschitzError, TrainerError
from lip_plugin.integrations.huggingface.metrics import METRICS
from lip_plugin.integrations.huggingface.trainer import DEFAULT_LR
from lip_plugin.surgery.state import find_retrofit
from tests.support.families import HF_FAMILIES, data_for, tiny
from tests.support.oracles import (
    CAP_TOLERANCE,
    assert_unchanged,
    fingerprint,
    paper,
    randomize_,
    worst_over_cap,
)

# transformers 5.23 renamed it
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
SMALL = {"hidden_size": 16, "num_hidden_layers": 1}


def data(rows: int = 32) -> list[dict]:
    return data_for("gpt2", rows)


def arguments(folder: Path, **fields) -> TrainingArguments:
    plain = {
        "max_steps": 10,
        "logging_steps": 5,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
    }
    plain |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 1}
    return TrainingArguments(str(folder), **{**plain, **fields})


def trainer_of(
    folder: Path,
    model: nn.Module,
    callback: TrainerCallback | None = None,
    family: str = "gpt2",
    **fields,
) -> Trainer:
    """The three lines of the README, with everything in every entry of the log."""
    callbacks = [callback or LipschitzCallback(certify_share=1)]
    return Trainer(
        model=model,
        args=arguments(folder, **fields),
        train_dataset=data_for(family),
        callbacks=callbacks,
    )


def inner(trainer: Trainer) -> torch.optim.Optimizer:
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


class AfterEveryStep(TrainerCallback):
    """ProvenNorms after each optimizer step, by the oracle."""

    def __init__(self) -> None:
        self.worst: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.worst.append(worst_over_cap(kwargs["model"]))


def assert_metrics(entries: list[dict]) -> None:
    assert entries
    for entry in entries:
        assert set(METRICS) <= set(entry)
        for key in METRICS:
            assert type(entry[key]) in (int, float), key
            assert math.isfinite(entry[key]), key
        assert entry["lip/worst_norm_over_cap"] <= 1.0 + CAP_TOLERANCE
        assert entry["lip/attention_entropy_proven"] <= entry["lip/attention_entropy_seen"]
        assert entry["lip/seconds_projecting"] >= 0


def losses(trainer: Trainer) -> list[float]:
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("family", HF_FAMILIES)
def test_a_lone_callback_retrofits_trains_logs_and_certifies(family, tmp_path):
    schedule = {"max_steps": 24, "logging_steps": 4, "save_strategy": "steps", "save_steps": 8}
    trainer = trainer_of(tmp_path, tiny(family, **SMALL), family=family, **schedule)
    each = AfterEveryStep()
    trainer.add_callback(each)
    assert find_retrofit(trainer.model) is not None
    trainer.train()
    assert isinstance(inner(trainer), LipschitzMuon)
    # Of five labels and one token there is less to win in as many steps, and bert has one map more
    # to the logits.
    less = {"bert_classifier": 0.02, "vit": 0.02, "bert": 0.3}
    less |= {"roberta_classifier": 0.1, "distilbert_classifier": 0.1}
    assert losses(trainer)[-1] < losses(trainer)[0] - less.get(family, 0.5)
    entries = [e for e in trainer.state.log_history if "loss" in e]
    assert [e["step"] for e in entries] == [4, 8, 12, 16, 20, 24]
    assert_metrics(entries)
    assert entries[-1]["lip/seconds_certifying"] > entries[0]["lip/seconds_certifying"] > 0
    assert len(each.worst) == 24
    assert max(each.worst) <= 1.0 + CAP_TOLERANCE
    for folder in (*(tmp_path / f"checkpoint-{n}" for n in (8, 16, 24)), tmp_path):
        written = Certificate.from_json((folder / "certificate.json").read_text())
        assert 0 < written.lipschitz < math.inf
    assert written == certify(trainer.model)  # the last one is of the final weights
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_logged_certificate_is_that_of_the_weights_at_that_step(tmp_path):
    trainer = trainer_of(tmp_path, tiny("llama", **SMALL), max_steps=6, logging_steps=6)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    assert entry["lip/log10_certificate"] == certify(trainer.model).log10_lipschitz
    assert entry["lip/log10_certificate_caps"] == certify(trainer.model, "caps").log10_lipschitz
    # the norms that a certificate proves may lie CAP_TOLERANCE above the caps, in some 20 factors
    assert entry["lip/log10_certificate"] <= entry["lip/log10_certificate_caps"] + 20 * math.log10(
        1 + CAP_TOLERANCE
    )


def test_metrics_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_of(tmp_path, tiny("gpt2", **SMALL), report_to="tensorboard")
    trainer.train()
    found = set()
    for folder in {p.parent for p in tmp_path.rglob("events.out.tfevents*")}:
        events = accumulator.EventAccumulator(str(folder)).Reload()
        found |= set(events.Tags()["scalars"])
    assert {f"train/{key}" for key in METRICS} <= found
    assert len({p.parent for p in tmp_path.rglob("events.out.tfevents*")}) == 1


def test_metrics_reach_any_reporter_and_the_bar_shows_the_bound(tmp_path, monkeypatch):
    class Reporter(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    reporter = Reporter()
    arguments_ = arguments(tmp_path)
    arguments_.disable_tqdm = False
    shown = []
    monkeypatch.setattr(tqdm, "write", lambda self, text, **kwargs: shown.append(text))
    callbacks = [reporter, LipschitzCallback(certify_share=1)]
    trainer = Trainer(tiny("gpt2", **SMALL), arguments_, train_dataset=data(), callbacks=callbacks)
    assert isinstance(
        trainer.callback_handler.callbacks[0], DefaultFlowCallback
    )  # which says whether a step saves
    assert isinstance(trainer.callback_handler.callbacks[1], LipschitzCallback)
    trainer.train()
    assert_metrics([e for e in reporter.seen if "loss" in e])
    lines = [ast.literal_eval(text) for text in shown if "'loss'" in text]
    assert len(lines) == 2
    assert all([k for k in line if k.startswith("lip/")] == ["lip/certificate"] for line in lines)


def test_put_first_keeps_the_others_in_order(tmp_path):
    trainer = trainer_of(tmp_path, tiny("gpt2", **SMALL))
    before = [c for c in trainer.callback_handler.callbacks if not isinstance(c, LipschitzCallback)]
    LipschitzCallback.put_first(trainer)
    assert [
        c for c in trainer.callback_handler.callbacks if not isinstance(c, LipschitzCallback)
    ] == before


def test_the_default_learning_rate_is_replaced_and_a_chosen_one_is_kept(tmp_path):
    trainer = trainer_of(tmp_path, tiny("gpt2", **SMALL), lr_scheduler_type="constant", max_steps=1)
    trainer.train()
    assert {g["lr"] for g in trainer.optimizer.param_groups} == {DEFAULT_LR}
    chosen = trainer_of(
        tmp_path,
        tiny("gpt2", **SMALL),
        lr_scheduler_type="constant",
        max_steps=1,
        learning_rate=0.02,
    )
    chosen.train()
    assert {g["lr"] for g in chosen.optimizer.param_groups} == {0.02}
    options = LipschitzCallback(paper(), lr=0.3, adamw_lr=0.006, momentum=0.8)
    own = trainer_of(
        tmp_path, tiny("gpt2", **SMALL), options, lr_scheduler_type="constant", max_steps=1
    )
    own.train()
    rates = {g["kind"]: g["lr"] * g["lr_ratio"] for g in own.optimizer.param_groups}
    assert rates["matrix"] == 0.3
    assert rates["adamw"] == pytest.approx(0.006)
    assert own.optimizer.param_groups[0]["momentum"] == 0.8


def test_two_trainers_in_one_process_keep_their_own_options(tmp_path):
    """Two Trainers in one process keep their own options.

    The handler table of transformers is global, and the options of a callback are not.
    """
    first = trainer_of(
        tmp_path / "1", tiny("gpt2", **SMALL), LipschitzCallback(momentum=0.5), max_steps=1
    )
    second = trainer_of(
        tmp_path / "2", tiny("gpt2", **SMALL), LipschitzCallback(momentum=0.7), max_steps=1
    )
    first.train()
    second.train()
    assert first.optimizer.param_groups[0]["momentum"] == 0.5
    assert second.optimizer.param_groups[0]["momentum"] == 0.7


def test_the_users_own_optimizer_is_kept_and_projected(tmp_path):
    model = tiny("llama", **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    each = AfterEveryStep()
    callbacks = [LipschitzCallback(), each]
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=data(),
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    trainer.train()
    assert inner(trainer) is optimizer
    assert max(each.worst) <= 1.0 + CAP_TOLERANCE
    assert_metrics([e for e in trainer.state.log_history if "loss" in e])
    assert trainer.state.log_history[0]["lip/seconds_projecting"] > 0


def test_an_optimizer_built_before_the_head_is_untied_is_refused_because_the_head_would_not_train(
    tmp_path,
):
    model = tiny("gpt2", **SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = fingerprint(model)
    with pytest.raises(TrainerError, match=r"(?s)tied.*retrofit\(model"):
        Trainer(
            model,
            arguments(tmp_path),
            train_dataset=data(),
            optimizers=(optimizer, None),
            callbacks=[LipschitzCallback()],
        )
    assert_unchanged(model, before)
    retrofit(model, paper())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    trainer = Trainer(
        model,
        arguments(tmp_path),
        train_dataset=data(),
        optimizers=(optimizer, None),
        callbacks=[LipschitzCallback()],
    )
    start = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, start)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_an_optimizer_chosen_by_name_is_kept_and_projected(name, family, tmp_path):
    each = AfterEveryStep()
    trainer = trainer_of(tmp_path, tiny(family, **SMALL), optim=name, learning_rate=0.5)
    trainer.add_callback(each)
    trainer.train()
    assert type(inner(trainer)).__name__.lower() == name
    assert max(each.worst) <= 1.0 + CAP_TOLERANCE
    assert not inner(
        trainer
    )._optimizer_step_post_hooks  # the projection went with the end of training


def test_muon_or_keep_can_be_said_in_words(tmp_path):
    trainer = trainer_of(
        tmp_path, tiny("gpt2", **SMALL), LipschitzCallback(optimizer="keep"), max_steps=1
    )
    trainer.train()
    assert isinstance(inner(trainer), torch.optim.AdamW)
    trainer = trainer_of(
        tmp_path,
        tiny("gpt2", **SMALL),
        LipschitzCallback(optimizer="muon"),
        max_steps=1,
        optim="sgd",
    )
    trainer.train()
    assert isinstance(inner(trainer), LipschitzMuon)
    with pytest.raises(ConfigError, match="optimizer='adam'"):
        LipschitzCallback(optimizer="adam")


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.01},
        {"bf16": True},
        {CHECKPOINTING: True},
        {"lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"weight_decay": 0.1},
        {"num_train_epochs": 2, "max_steps": -1},
        {"logging_first_step": True},
        {"torch_empty_cache_steps": 2},
    ],
    ids=lambda f: next(iter(f)),
)
def test_the_trainers_own_options_work_as_they_do(fields, tmp_path):
    each = AfterEveryStep()
    trainer = trainer_of(tmp_path, tiny("llama", **SMALL), **fields)
    trainer.add_callback(each)
    trainer.train()
    assert max(each.worst) <= 1.0 + CAP_TOLERANCE
    assert_metrics([e for e in trainer.state.log_history if "loss" in e])
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_evaluation_runs_and_its_logs_are_left_alone(tmp_path):
    model = tiny("gpt2", **SMALL)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=5)
    trainer = Trainer(
        model, args, train_dataset=data(), eval_dataset=data(8), callbacks=[LipschitzCallback()]
    )
    trainer.train()
    evaluations = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(evaluations) == 2
    assert not any(key in e for e in evaluations for key in METRICS)
    assert trainer.evaluate()["eval_loss"] == evaluations[-1]["eval_loss"]
    assert trainer.predict(data(4)).predictions.shape == (4, 16, 67)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_resumed_run_ends_bit_for_bit_where_the_unbroken_one_does(family, tmp_path):
    def make(folder: str) -> Trainer:
        fields = {"save_strategy": "steps", "save_steps": 6, "logging_steps": 3, "max_steps": 12}
        return trainer_of(tmp_path / folder, tiny(family, **SMALL), **fields)

    whole = make("whole")
    whole.train()
    torch.manual_seed(77)  # another start, which the checkpoint replaces
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == 12
    for (name, p), q in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    assert losses(resumed)[-1] == losses(whole)[-1]
    last = [
        json.loads((tmp_path / f / "certificate.json").read_text()) for f in ("whole", "resumed")
    ]
    assert last[0] == last[1]


def test_a_retrofitted_model_keeps_its_own_config(tmp_path):
    model = tiny("gpt2", **SMALL)
    retrofit(model, paper(w_max=2.5))
    trainer = trainer_of(tmp_path, model, max_steps=2)
    trainer.train()
    assert find_retrofit(model)[1].config.w_max == 2.5
    with pytest.raises(ConfigError, match="another config"):
        trainer_of(tmp_path, model, LipschitzCallback(paper(w_max=3.0)))


def test_training_twice_goes_on_within_the_caps(tmp_path):
    trainer = trainer_of(
        tmp_path, tiny("llama", **SMALL), optim="sgd", learning_rate=0.5, max_steps=4
    )
    trainer.train()
    trainer.train()
    assert worst_over_cap(trainer.model) <= 1.0 + CAP_TOLERANCE


def test_model_init_is_refused_with_the_cure(tmp_path):
    callbacks = [LipschitzCallback()]
    with pytest.raises(TrainerError, match=r"model_init.*Trainer\(model="):  # noqa: PT012
        trainer = Trainer(
            model_init=lambda: tiny("gpt2", **SMALL),
            args=arguments(tmp_path),
            train_dataset=data(),
            callbacks=callbacks,
        )
        trainer.train()


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("deepspeed", {"zero_optimization": {"stage": 2}}, "torchrun"),
        ("use_liger_kernel", True, "use_liger_kernel=False"),
    ],
)
def test_deepspeed_and_liger_are_refused_with_the_cure_and_nothing_is_changed(
    field, value, cure, tmp_path
):
    model, args = tiny("gpt2", **SMALL), arguments(tmp_path)
    setattr(args, field, value)  # neither needs to be installed to be refused
    before = fingerprint(model)
    state, control = Trainer(tiny("gpt2", **SMALL), arguments(tmp_path)).state, None
    with pytest.raises(TrainerError, match=cure):
        LipschitzCallback().on_init_end(args, state, control, model=model, optimizer=None)
    assert_unchanged(model, before)
    assert args.optim == arguments(tmp_path).optim
    assert issubclass(TrainerError, LipschitzError)


def test_a_pretrained_model_is_refused_unless_norms_is_chosen_in_words(tmp_path):
    randomize_(tiny("llama", **SMALL)).save_pretrained(tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    before = fingerprint(model)
    with pytest.raises(ConfigError, match="norms='keep'"):
        trainer_of(tmp_path, model)
    assert_unchanged(model, before)
    trainer = trainer_of(tmp_path, model, LipschitzCallback(paper(norms="keep")))
    trainer.train()
    assert worst_over_cap(model) <= 1.0 + CAP_TOLERANCE


def test_adapters_on_a_base_without_caps_are_refused_with_the_order(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny("llama", **SMALL), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    before = fingerprint(model)
    with pytest.raises(TrainerError, match=r"(?s)retrofit\(base.*get_peft_model"):
        trainer_of(tmp_path, model, LipschitzCallback(paper()))
    assert_unchanged(model, before)
    trainer_of(tmp_path, model)  # without a config their change gets a budget
    assert "lip_budget" in vars(model.base_model.model.model.layers[0].self_attn.q_proj)


def test_a_gradient_that_is_not_finite_stops_the_run_by_name(tmp_path):
    trainer = trainer_of(tmp_path, tiny("llama", **SMALL), max_grad_norm=0)
    trainer.model.lm_head.weight.register_hook(lambda g: g * math.nan)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    with pytest.raises(LipschitzError, match=r"gradient of .*weight holds nan"):
        trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


def test_data_that_cannot_be_indexed_only_loses_the_seen_values(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from data()

    args = arguments(tmp_path)
    trainer = Trainer(
        tiny("gpt2", **SMALL),
        args,
        train_dataset=Stream(),
        callbacks=[LipschitzCallback(certify_share=1)],
    )
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "loss" in e)
    seen = {"lip/largest_activation", "lip/attention_entropy_seen", "lip/attention_entropy_proven"}
    assert set(METRICS) - seen <= set(entry)


def test_no_logging_and_no_saving_need_nothing_from_the_callback(tmp_path):
    trainer = trainer_of(tmp_path, tiny("gpt2", **SMALL), logging_strategy="no", max_steps=3)
    trainer.train()
    assert worst_over_cap(trainer.model) <= 1.0 + CAP_TOLERANCE


def test_each_key_is_documented():
    assert all(key.startswith("lip/") and len(words) > 20 for key, words in METRICS.items())
    assert "METRICS" in LipschitzCallback.__doc__


def test_the_retrofit_is_reported_through_logging(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lip_plugin"):
        trainer_of(tmp_path, tiny("gpt2", **SMALL))
    assert "capped (rms_to_rms)" in caplog.text
