"""Killed at any moment a run ends where an unbroken one does; processes may come and go; a full disk costs nothing."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distributed_cases import CASES, backward, model_of, optimizer_of
from families import data_for, tiny
from test_distributed import launch
from transformers import Trainer, TrainingArguments

from lip_plugin import Certificate, LipschitzCallback, certify
from lip_plugin.checkpoint import load_checkpoint, save_checkpoint
from lip_plugin.errors import CertificateError, CheckpointError

SCRIPT = Path(__file__).with_name("checkpoint_script.py")
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
    while killed < kills:
        process = start(broken, "llama")
        first = process.stdout.readline()
        steps_seen.append(int(first.split()[1]))
        assert steps_seen[-1] >= steps_seen[-2]  # nothing that was saved is lost
        time.sleep(moments.uniform(0.0, 0.4))
        if process.poll() is not None:
            break  # it is through
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        killed += 1
    assert killed == kills or killed >= 3
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
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))


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


def trainer(folder: Path, steps: int) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, seed=1
    )
    model = tiny("gpt2", hidden_size=16, num_hidden_layers=1)
    return Trainer(model, args, train_dataset=data_for("gpt2"), callbacks=[LipschitzCallback()])


@pytest.mark.parametrize(
    "missing", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"]
)
def test_a_trainer_goes_on_from_its_last_complete_checkpoint(tmp_path, missing):
    from lip_plugin.integrations.hf_resume import last_checkpoint

    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    broken = trainer(tmp_path / "broken", 8)
    assert last_checkpoint(tmp_path / "broken") is None
    broken.train()
    shutil.rmtree(tmp_path / "broken" / "checkpoint-8")
    torn = tmp_path / "broken" / "checkpoint-6" / missing  # as a kill in the middle of this file leaves it
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    found = last_checkpoint(tmp_path / "broken")
    assert found == str(tmp_path / "broken" / "checkpoint-4")
    again = trainer(tmp_path / "broken", 8)
    again.train(resume_from_checkpoint=found)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
