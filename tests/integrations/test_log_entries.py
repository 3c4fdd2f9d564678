"""A certificate that cannot be had is a warning and a missing key, never the end of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lip_plugin import certify, retrofit
from lip_plugin.errors import CertificateError, DistributedError, NonFiniteError
from lip_plugin.integrations.huggingface import metrics as hf_measure
from lip_plugin.integrations.huggingface.metrics import (
    METRICS,
    certificate_or_reason,
    measure,
    measured,
)
from tests.integrations.test_trainer import SMALL, losses, trainer_of
from tests.support.families import tiny
from tests.support.oracles import paper

FROM_WEIGHTS = ("lip/log10_certificate", "lip/radius", "lip/attention_entropy_proven")
FROM_CAPS = ("lip/log10_certificate_caps",)


def hooked(model: torch.nn.Module) -> torch.nn.Module:
    """A model that is not what its graph says, by a hook that changes a block's output."""
    block = model.transformer.h[0].mlp
    block.register_forward_hook(lambda module, args, output: output * 1.5)
    with torch.no_grad():
        block.c_proj.weight.normal_()  # else it is zero, and so is what the hook changes
    return model


def test_a_run_whose_model_has_no_certificate_goes_on_with_warnings(tmp_path, caplog):
    fields = {"max_steps": 6, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(tmp_path, tiny("gpt2", **SMALL), **fields)
    stale = tmp_path / "certificate.json"
    stale.write_text("of an earlier run")
    hooked(trainer.model)
    with pytest.raises(CertificateError):
        certify(trainer.model)
    with caplog.at_level(logging.WARNING, logger="lip_plugin"):
        trainer.train()
    assert len(losses(trainer)) == 6
    missing = {*FROM_WEIGHTS, *FROM_CAPS}
    for entry in (e for e in trainer.state.log_history if "loss" in e):
        assert {key for key in METRICS if key not in entry} == missing
        assert entry["lip/worst_norm_over_cap"] <= 1.001
    assert not list(tmp_path.rglob("certificate.json*"))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == len(set(said))  # once each
    assert sum("cannot be logged" in s for s in said) >= 2
    for folder in ("checkpoint-3", "checkpoint-6", str(tmp_path)):
        assert any(f"{folder} has no certificate.json" in s and "reproduce" in s for s in said), (
            folder
        )
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").is_file()


def test_what_can_be_had_is_logged_beside_what_cannot(monkeypatch):
    model, ids = tiny("gpt2", **SMALL), torch.randint(67, (2, 8))
    retrofit(model, paper())
    whole, problems = measure(model, ids)
    assert problems == []
    timed = {"lip/seconds_projecting", "lip/seconds_certifying"}
    assert set(whole) == set(METRICS) - timed
    for source, lost in (("weights", FROM_WEIGHTS), ("caps", FROM_CAPS)):

        def refuses(model, chosen="weights", *, refused=source, **kwargs):
            if chosen == refused:
                raise NonFiniteError("no bound today")
            return certify(model, chosen, **kwargs)

        monkeypatch.setattr(hf_measure, "certify", refuses)
        values, problems = measure(model, ids)
        assert set(whole) - set(values) == set(lost)
        assert all(values[key] == whole[key] for key in values)
        assert len(problems) == 1
        assert "no bound today" in problems[0]


def test_disagreement_between_processes_and_a_bug_are_not_swallowed(monkeypatch, tmp_path):
    model = tiny("gpt2", **SMALL)
    retrofit(model, paper())
    for error in (DistributedError("they differ"), ZeroDivisionError("a bug")):

        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(hf_measure, "certify", fails)
        with pytest.raises(type(error)):
            measured(model, None)
        with pytest.raises(type(error)):
            certificate_or_reason(model, tmp_path)


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny("gpt2", **SMALL)
    retrofit(model, paper())
    if rank == 0:
        hooked(model)  # only there is anything computed, and only there does it fail
    run = Path(folder, "run")
    for step in range(2):  # in step with each other afterwards, too
        values, problems = measured(model, None)
        reason = certificate_or_reason(model, run)
        said = {"values": values, "problems": problems, "reason": reason}
        Path(folder, f"rank-{rank}-{step}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


@pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="gloo is not available"
)
def test_two_processes_say_the_same_and_stay_in_step(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "certificate.json").write_text("of an earlier run")
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    texts = {(tmp_path / f"rank-{r}-{s}.json").read_text() for r in range(2) for s in range(2)}
    assert len(texts) == 1
    said = json.loads(texts.pop())
    assert len(said["problems"]) == 2
    assert "lip/worst_norm_over_cap" in said["values"]
    assert "has no certificate.json" in said["reason"]
    assert not (tmp_path / "run" / "certificate.json").exists()
