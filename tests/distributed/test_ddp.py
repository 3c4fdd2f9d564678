"""Two real processes on gloo hold the caps, and their replicas are equal to the bit.

Certificates and lines are written once.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from lip_plugin import Certificate
from lip_plugin.errors import TrainerError
from lip_plugin.integrations.huggingface import arguments as hf_arguments
from tests.support.oracles import CAP_TOLERANCE
from tests.support.peft_ddp_cases import KINDS
from tests.support.processes import on_two_processes

RUNS = ["gpt2", "llama", "muon", "adamw", *KINDS, "trainer caps", "trainer budget"]
SCRIPT = Path(__file__).parents[1] / "support" / "ddp_script.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[dict]]:
    """One run under torchrun, as its folder and what each rank wrote."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("gloo is not available")
    folder = tmp_path_factory.mktemp("ddp")
    on_two_processes(SCRIPT, folder)
    return folder, [torch.load(folder / f"rank-{n}.pt", weights_only=True) for n in range(2)]


def test_there_are_two_real_processes(ranks):
    _, (one, two) = ranks
    assert one["world_size"] == two["world_size"] == 2
    assert {one["rank"], two["rank"]} == {0, 1}
    assert one["pid"] != two["pid"]
    assert one["backend"] == "gloo"
    assert one["gpt2"]["world_size"] == 2
    assert one["gpt2"]["wrapped"] == "DistributedDataParallel"


@pytest.mark.parametrize("run", RUNS)
def test_replicas_are_equal_to_the_bit(ranks, run):
    _, (one, two) = ranks
    assert one[run]["weights"].keys() == two[run]["weights"].keys()
    for name, weight in one[run]["weights"].items():
        assert torch.equal(weight, two[run]["weights"][name]), name


@pytest.mark.parametrize("run", RUNS)
def test_after_every_step_every_block_is_within_its_cap_on_each_rank(ranks, run):
    for rank in ranks[1]:
        assert len(rank[run]["worst"]) == 10
        assert max(rank[run]["worst"]) <= 1.0 + CAP_TOLERANCE


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_lone_callback_trains_with_muon_on_both_ranks(ranks, family):
    for rank in ranks[1]:
        assert rank[family]["optimizer"] == "LipschitzMuon"
        assert rank[family]["losses"][-1] < rank[family]["losses"][0]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_only_the_first_rank_logs_and_writes(ranks, family):
    folder, (one, two) = ranks
    assert (one[family]["logged"], two[family]["logged"]) == (2, 0)
    assert (
        len(one["written"]) == 11
    )  # at two checkpoints and at the end, of two families and the sharded one; adapters at the end
    assert two["written"] == []
    written = sorted(
        p.relative_to(folder / family).as_posix()
        for p in (folder / family).rglob("certificate.json*")
    )
    assert written == [
        "certificate.json",
        "checkpoint-10/certificate.json",
        "checkpoint-5/certificate.json",
    ]
    for name in written:
        Certificate.from_json((folder / family / name).read_text())


def test_lines_about_the_model_are_logged_once(ranks):
    _, (one, two) = ranks
    tables = [sum("capped (rms_to_rms)" in line for line in rank["lines"]) for rank in (one, two)]
    assert tables == [2, 0]  # one report for each family, on rank 0


def test_a_lone_callback_trains_a_model_that_transformers_sharded(ranks):
    folder, both = ranks
    for rank in (r["sharded"] for r in both):
        assert rank["sharded"] == rank["parameters"] > 5
        assert rank["optimizer"] == "LipschitzMuon"
        assert rank["worst"] <= 1.0 + CAP_TOLERANCE
        assert rank["losses"][-1] < rank["losses"][0]
        assert rank["certificate"] == both[0]["sharded"]["certificate"]
    assert [r["sharded"]["logged"] for r in both] == [2, 0]
    stated = Certificate.from_json(both[0]["sharded"]["certificate"])
    stated.verify(AutoModelForCausalLM.from_pretrained(folder / "sharded" / "final"))
    checkpoint = folder / "sharded" / "run" / "checkpoint-10"
    beside = Certificate.from_json((checkpoint / "certificate.json").read_text())
    beside.verify(AutoModelForCausalLM.from_pretrained(checkpoint))


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp1_is_refused_before_anything_is_changed(version):
    """FSDP1 is refused before anything is changed.

    Its arguments cannot be built without a launcher, so what `refuse_stack` reads of them is given.
    """
    args = SimpleNamespace(
        deepspeed=None,
        fsdp=True,
        fsdp_plugin_args={"fsdp_version": version},
        use_liger_kernel=False,
    )
    if version == 2:
        hf_arguments.refuse_stack(args, None, None, None)
        return
    with pytest.raises(TrainerError, match="FSDP2"):
        hf_arguments.refuse_stack(args, None, None, None)
