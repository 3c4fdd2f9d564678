"""Write a sample of the stand-in's checkpoint to sample.txt beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from model import GPT, GPTConfig
from overrides import overridden

config = overridden({"out_dir": "out", "max_new_tokens": 40, "seed": 1}, sys.argv[1:])
torch.manual_seed(config["seed"])
checkpoint = torch.load(os.path.join(config["out_dir"], "ckpt.pt"), map_location="cpu")
model = GPT(GPTConfig(**checkpoint["model_args"]))
model.load_state_dict(checkpoint["model"])
model.eval()
letters = sorted(set(Path("data.txt").read_text(encoding="utf-8")))
written = model.generate(torch.zeros(1, 1, dtype=torch.long), config["max_new_tokens"])
sample = "".join(letters[i] for i in written[0].tolist())
Path(config["out_dir"], "sample.txt").write_text(sample, encoding="utf-8")
