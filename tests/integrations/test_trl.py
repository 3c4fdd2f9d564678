"""TRL's SFTTrainer works with the lone callback, with adapters and without.

The base of the adapters is retrofitted or untouched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.families import tiny

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lip_plugin import Certificate, LipschitzCallback, certify, drift, retrofit
from lip_plugin.certificate.comparison.structure import structure_of
from lip_plugin.certificate.graph.build import build
from lip_plugin.errors import CertificateError
from lip_plugin.integrations.peft.enforce import merged_block_norms
from tests.support.oracles import paper

# TRL 1.16 still asks transformers for a name that goes in v6
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated and will be removed in v6:FutureWarning"
)
WORDS = [
    "to",
    "be",
    "or",
    "not",
    "that",
    "is",
    "the",
    "question",
    "whether",
    "tis",
    "nobler",
    "in",
    "mind",
    "suffer",
]
TOLERANCE = 1e-3


def tokenizer() -> Any:
    ids = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def trainer(model: Any, folder: Path, adapters: bool = True, **options: Any) -> Any:
    data = Dataset.from_dict({"text": [" ".join(WORDS[i:] + WORDS[:i]) for i in range(12)] * 2})
    args = SFTConfig(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        logging_steps=2,
        learning_rate=0.05,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    config = (
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
    )
    model.config.eos_token_id, model.config.pad_token_id = 1, 0
    return SFTTrainer(
        model,
        args,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=config,
        callbacks=[LipschitzCallback(**options)],
    )


@pytest.mark.parametrize("retrofitted", [True, False])
def test_sft_with_adapters_keeps_caps_or_budgets_and_logs_a_certificate(
    retrofitted: bool, tmp_path: Path
) -> None:
    model = tiny("llama", num_hidden_layers=1)
    if retrofitted:
        retrofit(model, paper(w_max=1.1))
    run = trainer(model, tmp_path)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    run.train()
    assert any(not torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    worst = [b.worst_over_cap for b in merged_block_norms(run.model)]
    assert 0.9 < max(worst) <= 1 + TOLERANCE  # a rate of 0.05 met the bound
    logged = [row for row in run.state.log_history if "lip/log10_certificate" in row]
    assert len(logged) == 2
    assert all(row["lip/worst_norm_over_cap"] <= 1 + TOLERANCE for row in logged)
    assert logged[-1]["lip/log10_certificate"] == pytest.approx(
        certify(run.model).log10_lipschitz, abs=1e-6
    )
    text = (tmp_path / "checkpoint-4" / "certificate.json").read_text()
    Certificate.from_json(text).verify(run.model)
    found = drift(run.model, restarts=2, steps=5)
    assert 0 < found.logit_lower <= found.logit_upper


def test_sft_without_adapters_takes_muon(tmp_path: Path) -> None:
    run = trainer(tiny("gpt2", num_hidden_layers=1), tmp_path, adapters=False)
    run.train()
    assert run.state.log_history[-2]["lip/worst_norm_over_cap"] <= 1 + TOLERANCE
    assert type(run.optimizer.optimizer).__name__ == "LipschitzMuon"


def test_only_the_patch_that_was_read_is_remembered(tmp_path: Path) -> None:
    """The comparison remembers TRL's own patch, and no other one.

    TRL wraps model.forward. Any other wrapper is compared each time, and fails.
    """
    run = trainer(tiny("llama", num_hidden_layers=1), tmp_path)
    root = run.model.get_base_model()
    assert "forward" in vars(root)
    assert certify(root).lipschitz > 0
    assert structure_of(build(root)) is not None
    real = root.forward

    def other(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    root.forward = other
    assert structure_of(build(root)) is None
    with pytest.raises(CertificateError):
        certify(root)
