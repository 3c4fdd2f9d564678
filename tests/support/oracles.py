"""Independent judges that several test files use.

They are norms by float64 SVD, fingerprints, and the recipe itself.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lip_plugin import LipschitzConfig, retrofit
from lip_plugin.config_values import LEGACY, LOGIT_SCALE
from lip_plugin.model.architecture import find_family
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.parts import Parts, parts
from tests.support.families import tiny

# Every promise about caps: float32 and bf16 autocast alike.
CAP_TOLERANCE = 1e-3


def rms(x: Tensor) -> Tensor:
    """RMS norm of each row."""
    return x.square().mean(-1).sqrt()


def rand(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers in float64, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, seed: int) -> Tensor:
    """A random matrix with orthonormal columns, float64, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def worst_over_cap(model: nn.Module) -> float:
    """The largest norm of a block over its cap, by a float64 SVD.

    Rows have their float64 RMS norm.
    """
    worst = 0.0
    for _, module in constrained_modules(model):
        for segment, blocks in module.layout.views(module.weight.detach().double()):
            if module.layout.norm == "row":
                norms = blocks.square().mean(-1).sqrt()
            else:
                norms = torch.linalg.svdvals(blocks)[..., 0] * math.sqrt(
                    blocks.shape[-1] / blocks.shape[-2]
                )
            worst = max(worst, float(norms.max()) / segment.cap)
    return worst


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 1) -> nn.Module:
    """Put random values of moderate size into every parameter.

    A map that is zero at first would hide the network.
    """
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = 0.3 if p.dim() < 2 else 1.5 / math.sqrt(min(p.shape))
        p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def random_model(name: str, config: LipschitzConfig | None, **overrides: Any) -> Any:
    """A tiny model with trained-like weights, retrofitted if there is a config."""
    model: Any = tiny(name, **overrides)
    if config is not None:
        retrofit(model, config)
    return randomize_(model)


def paper(**changes: Any) -> LipschitzConfig:
    """The recipe of arXiv 2507.13338, which `Recipe` writes out, with the default logit scale."""
    return LipschitzConfig(**{**LEGACY, **changes})


def retrofitted(family: str, config: LipschitzConfig | None = None, **overrides: Any) -> nn.Module:
    """A tiny constrained model with random weights, so that no zero map hides a branch."""
    return random_model(family, config or paper(), **overrides)


def table_of(model: nn.Module) -> Parts:
    """Which module of the model is what."""
    return parts(model, find_family(model).architecture)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocabulary] of a Hugging Face or nanoGPT model.

    Those of a classifier are [batch, 1, labels].
    """
    logits = model(ids, ids)[0] if type(model).__name__ == "GPT" else model(ids).logits
    return logits if logits.dim() == 3 else logits.unsqueeze(1)


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token cross entropy, by our own shift, so that all kinds of models agree on it.

    Classifiers: of the labels 0, 1, 2, .. in turn; masked language models: of every token itself.
    """
    logits = logits_of(model, ids)
    if logits.shape[1] == 1:
        return F.cross_entropy(logits[:, 0].float(), torch.arange(len(ids)) % logits.shape[-1])
    if "Masked" in type(model).__name__:
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a refused call must leave as it was."""
    config = getattr(model, "config", None)
    return {
        "tensors": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "identities": [
            (n, id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)
        ],
        "modules": [
            (name, type(m), m.training, sorted(m._forward_hooks), _plain(vars(m)))
            for name, m in model.named_modules(remove_duplicate=False)
        ],
        "config": copy.deepcopy(config.to_dict())
        if hasattr(config, "to_dict")
        else vars(config or object),
    }


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attributes.items() if isinstance(v, (bool, int, float, str, tuple))}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that nothing changed, bit for bit.

    A nan equals a nan, and a meta tensor equals another one of its shape.
    """
    after = fingerprint(model)
    assert {k: v for k, v in after.items() if k != "tensors"} == {
        k: v for k, v in before.items() if k != "tensors"
    }
    assert after["tensors"].keys() == before["tensors"].keys()
    for key, value in after["tensors"].items():
        was = before["tensors"][key]
        assert value.shape == was.shape
        assert value.dtype == was.dtype
        if not value.is_meta:
            assert torch.equal(value.nan_to_num(0.125), was.nan_to_num(0.125)), key


GELU, GELU_TANH, SILU, RELU = "gelu", "gelu_tanh", "silu", "relu"


@dataclass(frozen=True)
class Spec:
    """Where the oracle finds a family's parameters.

    `mlp` and `attention` are prefixes inside a layer.
    """

    layer: str
    attention: str
    mlp: str
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]  # one map, or (gate, up)
    down: str
    act: str
    head: str
    rows: tuple[str, ...]  # tokens, positions, types
    rotary: str | None = None
    interleaved: bool = False
    causal: bool = True
    parallel: bool = False


_LLAMA = Spec(
    "model.layers.{}.",
    "self_attn.",
    "mlp.",
    ("q_proj", "k_proj", "v_proj"),
    "o_proj",
    ("gate_proj", "up_proj"),
    "down_proj",
    SILU,
    "lm_head",
    ("model.embed_tokens",),
    "model.rotary_emb",
)
_GPT2 = Spec(
    "transformer.h.{}.",
    "attn.",
    "mlp.",
    ("c_attn",),
    "c_proj",
    ("c_fc",),
    "c_proj",
    GELU_TANH,
    "lm_head",
    ("transformer.wte", "transformer.wpe"),
)
_NEOX = Spec(
    "gpt_neox.layers.{}.",
    "attention.",
    "mlp.",
    ("query_key_value",),
    "dense",
    ("dense_h_to_4h",),
    "dense_4h_to_h",
    GELU,
    "lm_head",
    ("gpt_neox.embed_in",),
    "gpt_neox.rotary_emb",
    interleaved=True,
)
_OPT = Spec(
    "model.decoder.layers.{}.",
    "self_attn.",
    "",
    ("q_proj", "k_proj", "v_proj"),
    "out_proj",
    ("fc1",),
    "fc2",
    RELU,
    "lm_head",
    ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
)
_BERT = Spec(
    "bert.encoder.layer.{}.",
    "attention.",
    "",
    ("self.query", "self.key", "self.value"),
    "output.dense",
    ("intermediate.dense",),
    "output.dense",
    GELU,
    "cls.predictions.decoder",
    tuple(f"bert.embeddings.{t}_embeddings" for t in ("word", "position", "token_type")),
    causal=False,
)
_ROBERTA = replace(
    _BERT,
    layer="roberta.encoder.layer.{}.",
    head="lm_head.decoder",
    rows=tuple(name.replace("bert.", "roberta.") for name in _BERT.rows),
)
_DISTILBERT = Spec(
    "distilbert.transformer.layer.{}.",
    "attention.",
    "ffn.",
    ("q_lin", "k_lin", "v_lin"),
    "out_lin",
    ("lin1",),
    "lin2",
    GELU,
    "vocab_projector",
    tuple(f"distilbert.embeddings.{t}_embeddings" for t in ("word", "position")),
    causal=False,
)
_VIT = Spec(
    "vit.layers.{}.",
    "attention.",
    "mlp.",
    ("q_proj", "k_proj", "v_proj"),
    "o_proj",
    ("fc1",),
    "fc2",
    GELU,
    "classifier",
    (),
    causal=False,
)
_GEMMA = replace(_LLAMA, act=GELU_TANH)
SPECS = {
    "gpt2": _GPT2,
    "nanogpt": replace(_GPT2, act=GELU),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "olmo2"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3"), _GEMMA),
    "phi3": replace(_LLAMA, qkv=("qkv_proj",), up=("gate_up_proj",)),
    "gpt_neox": replace(_NEOX, parallel=True),
    "gpt_neox_sequential": _NEOX,
    **dict.fromkeys(("opt", "opt_post", "opt_projected"), _OPT),
    **{
        f"{name}_classifier": replace(_LLAMA, head="score")
        for name in ("llama", "mistral", "qwen2", "qwen3")
    },
    "gpt2_classifier": replace(_GPT2, head="score"),
    "bert": _BERT,
    "bert_classifier": replace(_BERT, head="classifier"),
    "roberta": _ROBERTA,
    "roberta_classifier": replace(_ROBERTA, head="classifier.out_proj"),
    "distilbert": _DISTILBERT,
    "distilbert_classifier": replace(_DISTILBERT, head="classifier"),
    "vit": _VIT,
}


class Recipe:
    """The transformer of arXiv 2507.13338 written out, straight from the parameters of a model.

    A block computes x <- (1-a) x + a f(x). Logits are attention_scale q.k / d_head, the output of
    attention is multiplied by value_scale, and an activation is divided by its largest slope. There
    is no norm, softcap or multiplier anywhere. Of parallel branches f is the mean. A table of
    position biases, if there is one, is added to the logits. Tuples are repeated over the layers.
    Nothing of lip_plugin is used.
    """

    def __init__(
        self,
        family: str,
        model: nn.Module,
        *,
        residual: float | tuple[float, float] | None = None,
        logits: float | tuple[float, ...] = 1.0,
        values: float | tuple[float, ...] = 1 / 3,
        logit_scale: float | None = None,
        activation: str | None = None,
    ) -> None:
        self.family, self.spec = family, SPECS[family]
        self.model, self.w = model, dict(model.named_parameters(remove_duplicate=False))
        c = model.config
        old = family in ("gpt2", "gpt2_classifier", "nanogpt")
        self.heads = c.n_head if old else c.num_attention_heads
        self.kv_heads = (not old and getattr(c, "num_key_value_heads", None)) or self.heads
        self.layers = c.n_layer if old else c.num_hidden_layers
        default = 1.0 / (self.layers + 1) if self.spec.parallel else 1.0 / (2 * self.layers)
        a = residual if residual is not None else default
        self.a = a if isinstance(a, tuple) else (a, a)
        self.logits, self.values, self.activation = (
            [logits] * self.layers if not isinstance(logits, tuple) else logits * self.layers,
            [values] * self.layers if not isinstance(values, tuple) else values * self.layers,
            activation,
        )
        # OPT's post-norm models and the BERTs have no norm slot behind the last block, where the
        # scale would go.
        slot = not family.startswith("opt_") and "bert" not in family
        self.logit_scale = logit_scale if logit_scale is not None else LOGIT_SCALE if slot else 1.0

    def linear(self, name: str, x: Tensor, bias: float = 1.0) -> Tensor:
        w = self.w[f"{name}.weight"]
        y = x @ w if self.family.startswith("gpt2") and name != self.spec.head else x @ w.T
        return y + bias * self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def __call__(self, inputs: Tensor) -> Tensor:
        (a, b), x = self.a, self.enter(inputs)
        for i in range(self.layers):
            layer = self.spec.layer.format(i)
            if self.spec.parallel:
                f = (self.values[i] * self.attention(layer, x, i) + self.mlp(layer, x, i)) / 2
                x = (1 - a) * x + a * f
            else:
                x = (1 - a) * x + a * self.values[i] * self.attention(layer, x, i)
                x = (1 - b) * x + b * self.mlp(layer, x, i)
        return self.leave(self.logit_scale * x)

    def enter(self, inputs: Tensor) -> Tensor:
        if self.family == "vit":
            name = "vit.embeddings.patch_embeddings.projection"
            weight, bias = self.w[f"{name}.weight"], self.w[f"{name}.bias"]
            x = (
                F.conv2d(inputs.to(weight.dtype), weight, bias, stride=weight.shape[-1])
                .flatten(2)
                .mT
            )
            first = self.w["vit.embeddings.cls_token"].expand(len(x), -1, -1)
            return torch.cat([first, x], 1) + self.w["vit.embeddings.position_embeddings"]
        tables = [self.w[f"{name}.weight"] for name in self.spec.rows]
        x = tables[0][inputs]
        if self.family == "opt_projected":
            x = self.linear("model.decoder.project_in", x)
        if (
            len(tables) > 1
        ):  # OPT's positions begin at row 2, RoBERTa's behind the row of its padding id
            start = 2 if self.family.startswith("opt") else 0
            start = (
                self.model.config.pad_token_id + 1 if self.family.startswith("roberta") else start
            )
            x = x + tables[1][start : start + inputs.shape[1]]
        return x + tables[2][0] if len(tables) > 2 else x

    def leave(self, x: Tensor) -> Tensor:
        if self.family.endswith("_classifier") or self.family == "vit":
            x = x[:, :1] if "bert" in self.family or self.family == "vit" else x[:, -1:]
        if self.family == "bert_classifier":
            x = self.linear("bert.pooler.dense", x).tanh()
        if self.family == "roberta_classifier":
            x = self.linear("classifier.dense", x).tanh()
        if self.family == "distilbert_classifier":
            x = self.linear("pre_classifier", x).relu()
        if self.family == "bert":
            x = F.gelu(self.linear("cls.predictions.transform.dense", x)) / 1.12890415
        if self.family == "distilbert":
            x = F.gelu(self.linear("vocab_transform", x)) / 1.12890415
        if (
            self.family == "roberta"
        ):  # its head calls gelu as a function: nothing divides it by its slope
            x = F.gelu(self.linear("lm_head.dense", x))
        if self.family == "opt_projected":
            x = self.linear("model.decoder.project_out", x)
        return self.linear(self.spec.head, x)

    def split(self, layer: str, x: Tensor, bias: float) -> tuple[Tensor, ...]:
        """Split into q, k and v, each [batch, heads, tokens, d_head]."""
        names = [f"{layer}{self.spec.attention}{name}" for name in self.spec.qkv]
        maps = [self.linear(name, x, bias) for name in names]
        if self.spec.interleaved:
            q, k, v = maps[0].unflatten(-1, (self.heads, 3, -1)).unbind(-2)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        heads = (self.heads, self.kv_heads, self.kv_heads)
        if len(maps) == 1:
            d_head = maps[0].shape[-1] // sum(heads)
            maps = list(maps[0].split([h * d_head for h in heads], dim=-1))
        return tuple(
            t.unflatten(-1, (h, -1)).transpose(1, 2) for t, h in zip(maps, heads, strict=True)
        )

    def attention(self, layer: str, x: Tensor, i: int) -> Tensor:
        # nanoGPT has no logit scale to set. Its attention input is scaled by s instead, and the
        # output by 1/s, so that a bias inside counts 1/s times. The others' biases count once.
        bias = 1.0
        if self.family == "nanogpt" and self.logits[i]:
            bias = (math.sqrt(x.shape[-1] // self.heads) / self.logits[i]) ** 0.5
        q, k, v = self.split(layer, x, bias)
        if self.spec.rotary:
            q, k = self.rotate(q, i), self.rotate(k, i)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = self.logits[i] * (q @ k.mT) / q.shape[-1]
        name = f"{layer}{self.spec.attention}position_bias.weight"
        if name in self.w:
            behind = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
            scores = (
                scores + self.w[name][:, behind.clamp_min(0) if self.spec.causal else behind.abs()]
            )
        mixed = scores.masked_fill(self.unseen(x.shape[1], i), -math.inf).softmax(-1) @ v
        name = f"{layer}{self.spec.attention}{self.spec.out}"
        return self.linear(name, mixed.transpose(1, 2).flatten(2), bias)

    def unseen(self, tokens: int, i: int) -> Tensor:
        """Which keys a query does not see.

        Key j is seen by query i if j <= i and i - j < window, and by every query in an encoder.
        """
        behind = torch.arange(tokens)[:, None] - torch.arange(tokens)
        if not self.spec.causal:
            return torch.zeros_like(behind).bool()
        config = self.model.config
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * self.layers
        window = (
            getattr(config, "sliding_window", None) if kinds[i] == "sliding_attention" else None
        )
        return (behind < 0) | (behind >= (window or tokens))

    def rotate(self, x: Tensor, i: int) -> Tensor:
        """Turn the pairs (j, j + w/2) by position * speed.

        The table is in float32, as that of the libraries is.
        """
        rotary = self.model.get_submodule(str(self.spec.rotary))
        kind = f"{self.model.config.layer_types[i]}_" if self.family == "gemma3" else ""
        speeds = getattr(rotary, f"{kind}inv_freq").float()
        half = len(speeds)
        angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * speeds
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def mlp(self, layer: str, x: Tensor, i: int) -> Tensor:
        names = [f"{layer}{self.spec.mlp}{name}" for name in self.spec.up]
        maps = [self.linear(name, x) for name in names]
        if self.family == "phi3":
            maps = list(maps[0].chunk(2, dim=-1))
        if len(maps) == 2 and self.activation == "abs":
            g, u = maps
            hidden = ((g**2 + u**2 + 1e-6).sqrt() - 1e-3) / math.sqrt(2.0)
        else:
            hidden = self.act(maps[0])
            hidden = hidden * maps[1] if len(maps) == 2 else hidden
        # OPT's branch is scaled at the activation, so its last bias is added as it is to what the
        # model carries: x / c, or x itself with norms behind the sum
        bias = 1.0
        if self.family == "opt":
            bias = ((1 - self.a[0]) * (1 - self.a[1])) ** (i + 1) / self.a[1]
        elif self.family.startswith("opt"):
            bias = (1 - self.a[1]) / self.a[1]
        return self.linear(f"{layer}{self.spec.mlp}{self.spec.down}", hidden, bias)

    def act(self, x: Tensor) -> Tensor:
        if self.activation == "abs":
            return x.abs()
        return {
            GELU: lambda: F.gelu(x) / 1.12890415,
            GELU_TANH: lambda: F.gelu(x, approximate="tanh") / 1.12899307,
            SILU: lambda: F.silu(x) / 1.09983933,
            RELU: lambda: x.relu(),
        }[self.spec.act]()
