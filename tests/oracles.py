"""Independent judges that several test files use: float64 SVD norms, fingerprints, the recipe itself."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lip_plugin.modules import constrained_modules

# Every promise about caps: float32 and bf16 autocast alike.
CAP_TOLERANCE = 1e-3


def worst_over_cap(model: nn.Module) -> float:
    """Largest block norm over its cap, by a float64 SVD (rows: by their float64 RMS norm)."""
    worst = 0.0
    for _, module in constrained_modules(model):
        for segment, blocks in module.layout.views(module.weight.detach().double()):
            if module.layout.norm == "row":
                norms = blocks.square().mean(-1).sqrt()
            else:
                norms = torch.linalg.svdvals(blocks)[..., 0] * math.sqrt(blocks.shape[-1] / blocks.shape[-2])
            worst = max(worst, float(norms.max()) / segment.cap)
    return worst


@torch.no_grad()
def randomize_(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random values of moderate size in every parameter: an initial zero map would hide the network."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        scale = 0.3 if p.dim() < 2 else 1.5 / math.sqrt(min(p.shape))
        p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [batch, tokens, vocabulary] of a Hugging Face or nanoGPT model."""
    return model(ids, ids)[0] if type(model).__name__ == "GPT" else model(ids).logits


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token cross entropy, by our own shift, so that both kinds of models agree on it."""
    logits = logits_of(model, ids)
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
        "config": copy.deepcopy(config.to_dict()) if hasattr(config, "to_dict") else vars(config or object),
    }


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in attributes.items() if isinstance(v, (bool, int, float, str, tuple))}


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Bit for bit; a nan equals a nan, and a meta tensor another of its shape."""
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


class Recipe:
    """The transformer of arXiv 2507.13338 written out, straight from the parameters of a model.

    x <- (1-a) x + a f(x); logits attention_scale q.k / d_head; attention's output times value_scale;
    activation over its largest slope; no norm anywhere. Nothing of lip_plugin is used.
    """

    NAMES = {
        "gpt2": ("transformer.h.{}.attn.", "transformer.h.{}.mlp."),
        "nanogpt": ("transformer.h.{}.attn.", "transformer.h.{}.mlp."),
        "llama": ("model.layers.{}.self_attn.", "model.layers.{}.mlp."),
    }

    def __init__(
        self,
        family: str,
        model: nn.Module,
        *,
        residual: float | None = None,
        logits: float = 1.0,
        values: float = 1 / 3,
    ) -> None:
        self.family = family if family in self.NAMES else "llama"
        self.model, self.w = model, dict(model.named_parameters())
        c = model.config
        self.heads = c.n_head if self.family != "llama" else c.num_attention_heads
        self.kv_heads = self.heads if self.family != "llama" else c.num_key_value_heads
        self.layers = c.n_layer if self.family != "llama" else c.num_hidden_layers
        self.a = residual if residual is not None else 1.0 / (2 * self.layers)
        self.logits, self.values = logits, values

    def linear(self, name: str, x: Tensor, bias: float = 1.0) -> Tensor:
        w = self.w[f"{name}.weight"]
        y = x @ w if self.family == "gpt2" else x @ w.T
        return y + bias * self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def __call__(self, ids: Tensor) -> Tensor:
        tokens, a = ids.shape[1], self.a
        if self.family == "llama":
            x = self.w["model.embed_tokens.weight"][ids]
        else:
            x = self.w["transformer.wte.weight"][ids] + self.w["transformer.wpe.weight"][:tokens]
        for i in range(self.layers):
            attention, mlp = (name.format(i) for name in self.NAMES[self.family])
            x = (1 - a) * x + a * self.values * self.attention(attention, x)
            x = (1 - a) * x + a * self.mlp(mlp, x)
        return x @ self.w["lm_head.weight"].T

    def attention(self, name: str, x: Tensor) -> Tensor:
        # nanoGPT has no logit scale to set: its attention input is scaled by s instead, and the output
        # by 1/s, so a bias inside counts 1/s times. The others' biases count once.
        bias = 1.0
        if self.family == "llama":
            q, k, v = (self.linear(name + p, x) for p in ("q_proj", "k_proj", "v_proj"))
        else:
            d_head = x.shape[-1] // self.heads
            bias = 1.0 if self.family == "gpt2" else (math.sqrt(d_head) / self.logits) ** 0.5
            q, k, v = self.linear(name + "c_attn", x, bias).chunk(3, dim=-1)
        q = q.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for t in (k, v))
        if self.family == "llama":
            q, k = self.rotate(q), self.rotate(k)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        scores = self.logits * (q @ k.mT) / q.shape[-1]
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ v
        out = "o_proj" if self.family == "llama" else "c_proj"
        return self.linear(name + out, mixed.transpose(1, 2).flatten(2), bias)

    def rotate(self, x: Tensor) -> Tensor:
        """Pairs (j, j + d/2) turned by position * theta^(-2j/d); the table in float32, as theirs is."""
        d, tokens = x.shape[-1], x.shape[-2]
        speeds = self.model.model.rotary_emb.inv_freq.float()
        angles = torch.arange(tokens, dtype=torch.float32)[:, None] * speeds
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        if self.family == "llama":
            gate = F.silu(self.linear(name + "gate_proj", x)) / 1.09983933
            return self.linear(name + "down_proj", gate * self.linear(name + "up_proj", x))
        up = self.linear(name + "c_fc", x)
        hidden = (
            F.gelu(up, approximate="tanh") / 1.12899307 if self.family == "gpt2" else F.gelu(up) / 1.12890415
        )
        return self.linear(name + "c_proj", hidden)
