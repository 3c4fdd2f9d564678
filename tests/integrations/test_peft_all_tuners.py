"""Every tuner that peft has is certified by a rule, or refused.

What is certified is compared with what it computes.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from lip_plugin import (
    LipschitzMuon,
    certified_radius,
    certify,
    drift,
    falsify,
    project_,
)
from lip_plugin.errors import CertificateError, LipschitzError, UnsupportedModelError
from tests.support.families import CLASSIFIERS, tiny
from tests.support.oracles import paper, random_model, randomize_

IDS = torch.arange(24).reshape(2, 12) % 67
CERTIFIED = {"LORA", "OFT", "HRA"}
SOFT = {"PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"}
KINDS = sorted(str(getattr(k, "value", k)) for k in PEFT_TYPE_TO_CONFIG_MAPPING)
_FIELDS: dict[str, dict[str, Any]] = {
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 2},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "OFT": {"oft_block_size": 8, "r": 0, "use_cayley_neumann": False},
    "ADALORA": {"total_step": 10},
    "VBLORA": {"vector_length": 8, "num_vectors": 4},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "BEFT": {"target_modules": ["q_proj"]},
    "C3A": {"block_size": 8},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "WAVEFT": {"n_frequency": 10},
    "POLY": {"n_tasks": 2, "n_skills": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
}
pytestmark = pytest.mark.filterwarnings("ignore")


def tuned(kind: str) -> Any:
    """A llama with this tuner, or a skip where peft itself does not build it here."""
    name = next(k for k in PEFT_TYPE_TO_CONFIG_MAPPING if str(getattr(k, "value", k)) == kind)
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    for targets in ({"target_modules": ["q_proj", "up_proj"]}, {}):
        fields = {"task_type": "CAUSAL_LM", **targets, **_FIELDS.get(kind, {})}
        base = random_model("llama", None)
        try:
            model = peft.get_peft_model(base, cls(**fields))
        except Exception as error:  # what a tuner needs is peft's own business
            reason = f"{type(error).__name__}: {str(error)[:120]}"
            continue
        return model
    pytest.skip(f"peft does not build {kind} on llama: {reason}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_tuner_is_certified_by_a_rule_or_refused(kind: str) -> None:
    model = tuned(kind)
    randomize_(model)  # adapters start as nothing
    if kind in CERTIFIED:
        certificate = certify(model)
        assert falsify(model, 2, 5).lower_bound <= certificate.lipschitz
        return
    for call in (
        lambda: certify(model),
        lambda: falsify(model, 1, 1),
        lambda: certified_radius(model, IDS),
        lambda: drift(random_model("llama", None), model),
    ):
        with pytest.raises(LipschitzError, match="LoRA|soft prompt|erge|holds"):
            call()


def test_most_tuners_were_built() -> None:
    """Most tuners are built, for the test above skips those that peft cannot build."""
    built = 0
    for kind in KINDS:
        try:
            tuned(kind)
            built += 1
        except pytest.skip.Exception:
            continue
    assert built >= len(KINDS) - 2  # X-LoRA wants folders of adapters


@pytest.mark.parametrize("kind", sorted(SOFT & set(KINDS)))
def test_soft_prompts_say_what_to_do(kind: str) -> None:
    model = tuned(kind)
    with pytest.raises(UnsupportedModelError, match=r"soft prompt.*get_base_model"):
        certify(model)


def test_hooks_on_a_peft_model_are_seen() -> None:
    model = tuned("LORA")

    def louder(module: Any, args: Any, out: Any) -> Any:
        out.logits = out.logits * 100
        return out

    for place in (model, model.base_model):
        handle = place.register_forward_hook(louder)
        with pytest.raises(CertificateError, match="behind the last layer"):
            certify(model)
        handle.remove()
    assert certify(model).lipschitz > 0


def test_lora_on_an_embedding_is_refused() -> None:
    model = peft.get_peft_model(tiny("gpt2"), peft.LoraConfig(target_modules=["wte", "c_fc"]))
    with pytest.raises(LipschitzError, match="wte"):
        certify(model)


@pytest.mark.parametrize("family", [name for name in CLASSIFIERS if name != "vit"])
def test_a_head_that_is_trained_beside_the_adapters_is_the_one_that_counts(family: str) -> None:
    """The head that is trained beside the adapters is the one that counts.

    task_type SEQ_CLS puts a copy of the head into modules_to_save, and runs that in its place.
    """
    targets = "all-linear" if "distil" not in family else ["q_lin", "lin1"]
    base = random_model(family, paper())
    project_(base)
    model: Any = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets)
    )
    certificate = certify(model)
    assert falsify(model, 1, 5).lower_bound <= certificate.lipschitz
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p.add_(torch.randn_like(p))
    louder = certify(model)
    assert louder.lipschitz > certificate.lipschitz
    ids = torch.randint(10, 60, (1, 8))
    with torch.no_grad():
        tuned = model(ids).logits
        with model.disable_adapter():
            untuned = model(ids).logits
            assert certify(model).lipschitz == pytest.approx(certificate.lipschitz, rel=1e-3)
    moved = float((tuned - untuned).abs().max())
    assert 0 < moved <= drift(model, attack=False).logit_upper
    LipschitzMuon(model)
    project_(model)
    assert certify(model, "caps").lipschitz > 0
