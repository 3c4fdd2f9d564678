"""A certificate that cannot be had is a warning and a missing key, never the end of a run."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lip_plugin import Certificate, LipschitzConfig, certify, retrofit
from lip_plugin.errors import CertificateError, DistributedError, NonFiniteError
from lip_plugin.integrations.huggingface import metrics as hf_measure
from lip_plugin.integrations.huggingface.entries import Entries
from lip_plugin.integrations.huggingface.metrics import (
    METRICS,
    PARTS,
    TIMES,
    certificate_or_reason,
    measure,
    measured,
)
from lip_plugin.linalg import norms
from lip_plugin.model.batches import measured_once
from lip_plugin.surgery.block_norms import block_norms
from tests.integrations.test_trainer import SMALL, losses, trainer_of
from tests.support.families import tiny
from tests.support.oracles import paper

FROM_WEIGHTS = (
    "lip/certificate",
    "lip/log10_certificate",
    "lip/radius",
    "lip/attention_entropy_proven",
)
FROM_CAPS = ("lip/certificate_caps", "lip/log10_certificate_caps")


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
    found = measure(model, ids)
    whole = found.values
    assert found.problems == []
    assert set(whole) == set(METRICS) - set(TIMES)
    for source, lost in (("weights", FROM_WEIGHTS), ("caps", FROM_CAPS)):

        def refuses(model, chosen="weights", *, refused=source, **kwargs):
            if chosen == refused:
                raise NonFiniteError("no bound today")
            return certify(model, chosen, **kwargs)

        monkeypatch.setattr(hf_measure, "certify", refuses)
        found = measure(model, ids)
        values = found.values
        assert set(whole) - set(values) == set(lost)
        assert all(values[key] == whole[key] for key in values)
        assert len(found.problems) == 1
        assert "no bound today" in found.problems[0]


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
        found = measured(model, None)
        reason = certificate_or_reason(model, run)
        said = {"values": found.values, "problems": found.problems, "reason": reason}
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


def proofs(monkeypatch, call) -> list[torch.Size]:
    """Shapes of the batches of blocks whose norms were proven during a call."""
    shapes = []
    plain = norms._gram_trace_slack

    def counted(blocks):
        shapes.extend([blocks.shape[1:]] * len(blocks))
        return plain(blocks)

    with monkeypatch.context() as patch:
        patch.setattr(norms, "_gram_trace_slack", counted)
        call()
    return sorted(shapes)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_an_entry_proves_each_norm_once(family, monkeypatch):
    """An entry with both certificates and norms over caps costs the proofs of one certificate."""
    model = tiny(family)
    retrofit(model, LipschitzConfig())
    ids = torch.randint(60, (2, 8))
    alone = proofs(monkeypatch, lambda: certify(model))
    entry = proofs(monkeypatch, lambda: measure(model, ids))
    assert entry == alone
    apart = proofs(monkeypatch, lambda: (certify(model), block_norms(model)))
    assert len(apart) > len(alone)  # the test can fail


def test_a_change_of_a_weight_is_measured(monkeypatch):
    model = tiny("gpt2")
    retrofit(model, LipschitzConfig())
    with measured_once():
        before = certify(model).log10_lipschitz
        with torch.no_grad():
            model.transformer.h[0].mlp.c_fc.weight.mul_(2.0)
        assert certify(model).log10_lipschitz > before + 0.1
        worst = max(b.worst_over_cap for b in block_norms(model))
    again = max(b.worst_over_cap for b in block_norms(model))
    assert worst > 1.9
    assert worst == pytest.approx(again, rel=1e-12)  # another batch rounds otherwise


def test_what_the_run_has_no_time_for_is_left_out(monkeypatch):
    """The share decides part by part, and the times are always there."""
    model = tiny("gpt2")
    retrofit(model, LipschitzConfig())
    entries = Entries(0.01)
    entries.begin(model, torch.randint(60, (2, 8)), 0)
    entries._times["weights"].expect(1e9)
    found = entries.entry(model, 1, 0.5)
    assert "lip/certificate" not in found.values
    assert "lip/worst_norm_over_cap" not in found.values
    assert found.values["lip/certificate_caps"] > 0
    assert set(TIMES) <= set(found.values)
    assert found.values["lip/seconds_projecting_step"] == 0.5
    whole = Entries(1.0)
    whole.begin(model, torch.randint(60, (2, 8)), 0)
    assert set(whole.entry(model, 4, 2.0).values) == set(METRICS)
    assert set(whole.entry(model, 8, 4.0).seconds) == set(PARTS)
    assert whole.entry(model, 8, 4.0).values["lip/seconds_projecting_step"] == 0.0


def test_a_save_behind_an_entry_proves_nothing_again(tmp_path, monkeypatch):
    model = tiny("gpt2")
    retrofit(model, LipschitzConfig())
    entries = Entries(1.0)
    entries.begin(model, None, 0)
    entries.entry(model, 1, 0.0)
    assert proofs(monkeypatch, lambda: entries.write(model, tmp_path)) == []
    assert Certificate.from_json((tmp_path / "certificate.json").read_text()) == certify(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(0.5)
    assert proofs(monkeypatch, lambda: entries.write(model, tmp_path)) != []
    assert Certificate.from_json((tmp_path / "certificate.json").read_text()) == certify(model)
