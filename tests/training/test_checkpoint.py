"""A run that is killed at any moment ends where an unbroken one does.

Processes may come and go, and a full disk costs nothing.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lip_plugin import (
    Certificate,
    LipschitzCallback,
    LipschitzMuon,
    attach_projection,
    certify,
    load_checkpoint,
    save_checkpoint,
)
from lip_plugin.errors import CertificateError, CheckpointError, ConfigError
from lip_plugin.integrations.huggingface.resume import last_checkpoint
from lip_plugin.model.layers import constrained_modules
from tests.distributed.test_distributed import launch
from tests.support.distributed_cases import CASES, backward, model_of, optimizer_of
from tests.support.families import data_for, tiny
from tests.support.oracles import CAP_TOLERANCE, worst_over_cap

SCRIPT = Path(__file__).parents[1] / "support" / "checkpoint_script.py"
STEPS = 30


def start(run: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, str(SCRIPT), str(run), str(STEPS), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(run: Path, name: str) -> dict[str, torch.Tensor]:
    process = start(run, name)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return torch.load(run / "final.pt", weights_only=True)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_bit_for_bit_where_the_unbroken_run_does(tmp_path, kills):
    whole = finish(tmp_path / "whole", "llama")
    broken, moments, killed = tmp_path / "broken", random.Random(kills), 0
    steps_seen = [0]
    while killed < kills or max(steps_seen) == 0:
        assert killed < 10 * kills, "no checkpoint was ever found"
        process = start(broken, "llama")
        first = process.stdout.readline()
        steps_seen.append(int(first.split()[1]))
        assert steps_seen[-1] >= steps_seen[-2]  # nothing that was saved is lost
        # a slow machine, on which no kill came behind a checkpoint yet, gets more time
        time.sleep(moments.uniform(0.0, 0.4 * (1 + killed // kills)))
        if process.poll() is not None:
            break  # it is through
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed += 1
    assert killed >= min(kills, 3)
    again = finish(broken, "llama")
    assert max(steps_seen) > 0
    assert whole.keys() == again.keys()
    for name, weight in whole.items():
        assert torch.equal(weight, again[name]), name


def test_two_processes_go_on_as_four_and_as_one(tmp_path):
    """In float64, so that nothing but a mistake is above 1e-12."""
    name, run = "gpt2 double", tmp_path / "run"
    whole = finish(tmp_path / "whole", name)
    for processes, steps, how in ((2, 10, "fsdp"), (4, 16, "fsdp"), (2, 22, "ddp")):
        result = launch(SCRIPT, processes, str(run), str(steps), name, how)
        assert result.returncode == 0, result.stderr[-3000:]
    again = finish(run, name)
    for key, weight in whole.items():
        assert float((weight - again[key]).abs().max()) <= 1e-12, key


def trained(steps: int = 3):
    case = CASES["llama"]
    model = model_of(case)
    optimizer = optimizer_of(case, model)
    for step in range(steps):
        backward(case, model, step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_a_disk_that_is_full_raises_and_leaves_the_last_checkpoint(tmp_path):
    model, optimizer = trained()
    first = save_checkpoint(tmp_path, 3, model, optimizer)
    before = {p.name: p.read_bytes() for p in first.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (
        0,
        4096,
        30_000,
    ):  # bytes that a file may take: none, part of the weights, all but the certificate
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError):
                save_checkpoint(tmp_path, 4, model, optimizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-3"]
        assert {p.name: p.read_bytes() for p in first.iterdir()} == before
    fresh, other = trained(0)
    assert load_checkpoint(tmp_path, fresh, other) == 3
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True)
    )


def test_the_certificate_beside_weights_is_of_these_weights(tmp_path):
    model, optimizer = trained()
    folder = save_checkpoint(tmp_path, 3, model, optimizer)
    Certificate.from_json((folder / "certificate.json").read_text()).verify(model)
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)
    (folder / "certificate.json").write_text(certify(model).to_json())
    with pytest.raises(CertificateError, match="other weights"):
        load_checkpoint(tmp_path, *trained(0))


def test_what_is_not_complete_is_not_loaded_and_old_ones_go(tmp_path):
    model, optimizer = trained()
    assert load_checkpoint(tmp_path, model, optimizer) is None
    for step in (3, 4, 5, 5):
        save_checkpoint(tmp_path, step, model, optimizer, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-4", "step-5"]
    shutil.copytree(tmp_path / "step-5", tmp_path / ".partial-6")
    (tmp_path / "step-7").mkdir()  # of another program
    assert load_checkpoint(tmp_path, model, optimizer) == 5
    (tmp_path / "step-5").rename(
        tmp_path / ".replaced-5"
    )  # killed between the two renames of a step saved twice
    assert load_checkpoint(tmp_path, model, optimizer) == 5


def test_another_model_is_refused(tmp_path):
    model, optimizer = trained()
    save_checkpoint(tmp_path, 3, model, optimizer)
    case = CASES["gpt2"]
    other = model_of(case)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_checkpoint(tmp_path, other, optimizer_of(case, other))


def stepped(model, optimizer, steps=2, seed=50):
    for step in range(seed, seed + steps):
        backward(CASES["llama"], model, step, 0, 1)
        optimizer.step()
        optimizer.zero_grad()


def made(kind: str, **config):
    case = replace(CASES["llama"], config=config)
    model = model_of(case)
    if kind == "sgd without momentum":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        attach_projection(optimizer, model)
        return model, optimizer
    return model, optimizer_of(replace(case, optimizer=kind), model)


@pytest.mark.parametrize("kind", ["muon", "adamw", "sgd without momentum"])
@pytest.mark.parametrize("steps", [0, 2])
def test_saving_changes_nothing_and_loading_brings_back_the_same_bits(tmp_path, kind, steps):
    model, optimizer = made(kind)
    stepped(model, optimizer, steps)
    before = [p.detach().clone() for p in model.parameters()]
    save_checkpoint(tmp_path, steps, model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    again, other = made(kind)
    assert load_checkpoint(tmp_path, again, other) == steps
    assert all(torch.equal(a, b) for a, b in zip(before, again.parameters(), strict=True))
    stepped(model, optimizer)
    stepped(again, other)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_bf16_weights_keep_the_momentum_that_they_had(tmp_path):
    runs = []
    for _ in range(2):
        model = model_of(CASES["llama"]).bfloat16()
        runs.append((model, LipschitzMuon(model, lr=0.05)))
    (model, optimizer), (again, other) = runs
    stepped(model, optimizer)
    save_checkpoint(tmp_path, 2, model, optimizer)
    load_checkpoint(tmp_path, again, other)
    momenta = [s["momentum"] for s in other.state.values() if "momentum" in s]
    assert {m.dtype for m in momenta} == {torch.float32}
    stepped(model, optimizer)
    stepped(again, other)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )


def test_a_parameter_that_never_had_a_gradient_does_not_matter(tmp_path):
    model, optimizer = made("muon")
    x = torch.randn(2, 5, 24)
    model(inputs_embeds=x).logits.square().mean().backward()  # the embedding takes no part
    assert model.get_input_embeddings().weight.grad is None
    optimizer.step()
    save_checkpoint(tmp_path, 1, model, optimizer)
    assert load_checkpoint(tmp_path, *made("muon")) == 1


def test_caps_of_the_run_that_goes_on_hold_not_those_that_were_saved(tmp_path):
    model, optimizer = made("muon", w_max=2.0)
    stepped(model, optimizer, 5)
    save_checkpoint(tmp_path, 5, model, optimizer)
    case = replace(CASES["llama"], config={"w_max": 0.5})
    tighter = model_of(case)
    other = LipschitzMuon(tighter, lr=0.1)
    with pytest.raises(CertificateError, match="other settings"):  # the certificate is of caps of 2
        load_checkpoint(tmp_path, tighter, other)
    for step in range(10):
        stepped(tighter, other, 1, step)
        assert worst_over_cap(tighter) <= 1 + CAP_TOLERANCE


def test_frozen_otherwise_than_when_it_was_saved_every_layout_is_its_own(tmp_path):
    model, optimizer = made("muon")
    stepped(model, optimizer)
    save_checkpoint(tmp_path, 2, model, optimizer)
    case = replace(CASES["llama"], frozen="q_proj.weight")
    again = model_of(case)
    other = LipschitzMuon(again, lr=0.1)
    load_checkpoint(tmp_path, again, other)
    layouts = {id(m.weight): m.layout.to_plain() for _, m in constrained_modules(again)}
    for group in other.param_groups:
        for p, layout in zip(
            group["params"], group.get("layouts") or [None] * len(group["params"]), strict=True
        ):
            assert layout == layouts.get(id(p))
    stepped(again, other)
    assert worst_over_cap(again) <= 1 + CAP_TOLERANCE


def test_a_folder_with_later_steps_is_refused_and_what_is_given_is_given_back(tmp_path):
    model, optimizer = trained()
    save_checkpoint(
        tmp_path, 7, model, optimizer, {"step": 123, "list": [1, "a"], "t": torch.ones(2)}
    )
    extra = {"step": 0, "list": None, "t": None}
    assert load_checkpoint(tmp_path, model, optimizer, extra) == 7
    assert extra["step"] == 123
    assert extra["list"] == [1, "a"]
    assert torch.equal(extra["t"], torch.ones(2))
    with pytest.raises(ConfigError, match="step-7"):
        save_checkpoint(tmp_path, 5, model, optimizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-7"]


def test_a_removal_that_was_cut_off_does_not_count(tmp_path, monkeypatch):
    model, optimizer = trained()
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer)
    monkeypatch.setattr(shutil, "rmtree", lambda *a, **k: None)  # killed as it begins
    save_checkpoint(tmp_path, 3, model, optimizer)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "step-3")
    shutil.rmtree(tmp_path / "step-2")
    assert (tmp_path / "step-1").is_dir()
    assert load_checkpoint(tmp_path, *trained(0)) is None


def trainer(folder: Path, steps: int) -> Trainer:
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=1,
    )
    model = tiny("gpt2", hidden_size=16, num_hidden_layers=1)
    return Trainer(model, args, train_dataset=data_for("gpt2"), callbacks=[LipschitzCallback()])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", "cut"),
        ("model.safetensors", "gone"),
        ("optimizer.pt", "gone"),
        ("rng_state.pth", "gone"),
        ("trainer_state.json", "gone"),
        ("optimizer_0/__0_0.distcp", "without metadata"),
        ("adapter_model.safetensors", "half"),
    ],
)
def test_what_lacks_a_part_is_no_complete_checkpoint(tmp_path, name, change):
    run = trainer(tmp_path, 4)
    run.train()
    newest = tmp_path / "checkpoint-4"
    assert last_checkpoint(tmp_path) == str(newest)
    file = newest / name
    if change == "gone":
        file.unlink()
    elif change == "cut":
        file.write_text(file.read_text()[:20])
    else:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 64)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("first", [False, True])
def test_a_save_over_an_older_run_that_is_cut_off_leaves_nothing_to_go_on_from(
    tmp_path, first, monkeypatch
):
    trainer(tmp_path, 2).train()
    assert (tmp_path / "checkpoint-2" / "certificate.json").is_file()
    again = trainer(tmp_path, 2)
    if first:
        LipschitzCallback.put_first(again)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(again, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert not (tmp_path / "checkpoint-2" / "certificate.json").exists()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_trainer_goes_on_from_its_last_complete_checkpoint(tmp_path, missing):
    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    broken = trainer(tmp_path / "broken", 8)
    assert last_checkpoint(tmp_path / "broken") is None
    broken.train()
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    torn = (
        tmp_path / "broken" / "checkpoint-6" / missing
    )  # as a kill in the middle of this file leaves it
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    found = last_checkpoint(tmp_path / "broken")
    assert found == str(tmp_path / "broken" / "checkpoint-4")
    again = trainer(tmp_path / "broken", 8)
    again.train(resume_from_checkpoint=found)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
