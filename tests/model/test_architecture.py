"""For a model of no known family the error says what is wrong, and what can be done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn
from transformers import AutoConfig

from lip_plugin import certify, retrofit
from lip_plugin.errors import UnsupportedModelError
from tests.support.families import tiny
from tests.support.oracles import assert_unchanged, fingerprint

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}
SMALL |= {"intermediate_size": 8}


def of_class(cls: str, family: str, **fields: Any) -> Callable[[], nn.Module]:
    """A model of another class with a tiny family's config."""

    def make() -> nn.Module:
        config = tiny(family).config
        for key, value in fields.items():
            setattr(config, key, value)
        return getattr(transformers, cls)(config)

    return make


def t5() -> nn.Module:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    return transformers.T5ForConditionalGeneration(AutoConfig.for_model("t5", **sizes))


def clip() -> nn.Module:
    vision = {**SMALL, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(
        AutoConfig.for_model("clip", text_config=SMALL, vision_config=vision)
    )


KNOWN = "of this model_type these are known: "
HEAD = "language-model head or classifier"
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "no head": (
        of_class("GPT2Model", "gpt2"),
        (KNOWN + "GPT2LMHeadModel; GPT2ForSequenceClassification.", HEAD, "AutoModelForCausalLM"),
    ),
    "two heads": (
        of_class("GPT2DoubleHeadsModel", "gpt2"),
        ("GPT2DoubleHeadsModel (model_type 'gpt2')", HEAD),
    ),
    "no head, llama": (of_class("LlamaModel", "llama"), (KNOWN + "LlamaForCausalLM;", HEAD)),
    "one label a token": (
        of_class("LlamaForTokenClassification", "llama", num_labels=3),
        ("LlamaForSequenceClassification", HEAD),
    ),
    "no head, bert": (
        of_class("BertModel", "bert"),
        ("BertForMaskedLM with is_decoder=False", HEAD),
    ),
    "no head, roberta": (
        of_class("RobertaModel", "roberta"),
        ("RobertaForSequenceClassification with", HEAD),
    ),
    "no head, distilbert": (
        of_class("DistilBertModel", "distilbert"),
        ("DistilBertForMaskedLM;", HEAD),
    ),
    "an encoder as a decoder": (
        of_class("RobertaForMaskedLM", "roberta", is_decoder=True),
        ("RobertaForMaskedLM with is_decoder=False",),
    ),
    "opt projected in front": (
        of_class("OPTForCausalLM", "opt", word_embed_proj_dim=24),
        (
            "OPTForCausalLM with do_layer_norm_before=True "
            "and word_embed_proj_dim equal to hidden_size",
        ),
    ),
    "encoder-decoder": (t5, ("is an encoder-decoder", "no rule", "GPT2LMHeadModel")),
    "two towers": (
        clip,
        ("joins several models (text_config, vision_config)", "no rule", "ViTForImageCl"),
    ),
    "a plain module": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        ("Sequential", "not a transformer of a known family", "nanogpt", "plain Linear layers"),
    ),
}


@pytest.mark.filterwarnings("ignore")  # of encoders built as decoders
@pytest.mark.parametrize("call", [retrofit, certify])
@pytest.mark.parametrize("what", CASES)
def test_the_error_says_what_is_wrong_and_what_to_do(
    what: str, call: Callable[[nn.Module], Any]
) -> None:
    make, words = CASES[what]
    model = make().eval()
    before = fingerprint(model)
    with pytest.raises(UnsupportedModelError, match="No architecture is described for") as raised:
        call(model)
    for word in words:
        assert word.lower() in str(raised.value).lower()
    assert_unchanged(model, before)


def test_only_transformers_are_told_to_describe_a_family() -> None:
    for make, _ in (CASES["no head"], CASES["encoder-decoder"], CASES["two towers"]):
        with pytest.raises(UnsupportedModelError) as raised:
            certify(make())
        assert "register_family" not in str(raised.value)
