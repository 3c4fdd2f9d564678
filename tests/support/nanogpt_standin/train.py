"""Train the stand-in on data.txt, with the stages, names and checkpoint of nanoGPT's script."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
from model import GPT, GPTConfig
from overrides import overridden

defaults = {
    "out_dir": "out",
    "init_from": "scratch",
    "eval_interval": 20,
    "max_iters": 40,
    "batch_size": 16,
    "block_size": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "dropout": 0.0,
    "bias": True,
    "learning_rate": 1e-3,
    "min_lr": 1e-4,
    "weight_decay": 0.1,
    "compile": False,
}
config = overridden(defaults, sys.argv[1:])
torch.manual_seed(1337)
os.makedirs(config["out_dir"], exist_ok=True)
ckpt_path = os.path.join(config["out_dir"], "ckpt.pt")

text = Path("data.txt").read_text(encoding="utf-8")
letters = sorted(set(text))
data = torch.tensor([letters.index(c) for c in text])


def get_batch() -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.randint(len(data) - config["block_size"], (config["batch_size"],))
    rows = torch.stack([data[s : s + config["block_size"] + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


iter_num, best_val_loss, checkpoint = 0, 1e9, None
model_args = {
    k: config[k] for k in ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")
}
model_args["vocab_size"] = len(letters)
if config["init_from"] == "resume":
    checkpoint = torch.load(ckpt_path, map_location="cpu")
    model_args = checkpoint["model_args"]
    iter_num, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
if config["init_from"].startswith("gpt2"):
    model = GPT.from_pretrained(config["init_from"], {"vocab_size": len(letters)})
else:
    model = GPT(GPTConfig(**model_args))
if checkpoint is not None:
    weights = {k.removeprefix("_orig_mod."): v for k, v in checkpoint["model"].items()}
    model.load_state_dict(weights)
if config["block_size"] < model.config.block_size:
    model.crop_block_size(config["block_size"])
    model_args["block_size"] = config["block_size"]

optimizer = model.configure_optimizers(
    config["weight_decay"], config["learning_rate"], (0.9, 0.95), "cpu"
)
if checkpoint is not None:
    optimizer.load_state_dict(checkpoint["optimizer"])
raw_model = model
if config["compile"]:
    model = torch.compile(model)

losses, rates = [], []
while iter_num <= config["max_iters"]:
    part = 0.5 + 0.5 * math.cos(math.pi * iter_num / max(config["max_iters"], 1))
    lr = config["min_lr"] + part * (config["learning_rate"] - config["min_lr"])
    for group in optimizer.param_groups:
        group["lr"] = lr
    rates.append([group["lr"] * group.get("lr_ratio", 1.0) for group in optimizer.param_groups])
    if iter_num > 0 and iter_num % config["eval_interval"] == 0:
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "model_args": model_args,
            "iter_num": iter_num,
            "best_val_loss": best_val_loss,
            "config": config,
        }
        torch.save(checkpoint, ckpt_path)
    _, loss = model(*get_batch())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
    best_val_loss = min(best_val_loss, losses[-1])
    iter_num += 1
