"""A loop of your own with nothing but torch: one process, DDP, or FSDP2.

python examples/torch_loop.py
torchrun --nproc_per_node 2 examples/torch_loop.py [--fsdp]
"""

import argparse
import os
from pydoc_data import topics

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import (
    LipschitzConfig,
    LipschitzMuon,
    certify,
    load_checkpoint,
    retrofit,
    save_checkpoint,
)

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--out", default="runs/torch_loop")
parser.add_argument("--fsdp", action="store_true", help="shard the weights")
parser.add_argument("--smoke", action="store_true")
options = parser.parse_args()
steps, length = (6, 32) if options.smoke else (300, 128)
many = "RANK" in os.environ
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
if many:
    torch.cuda.set_device(device) if device != "cpu" else None
    dist.init_process_group()
text = "\n".join(topics.topics.values())  # the Python language reference
vocabulary = sorted(set(text))
ids = torch.tensor([vocabulary.index(c) for c in text], device=device)
torch.manual_seed(0)
sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": length}
model = GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, eos_token_id=None)).to(
    device
)
retrofit(model, LipschitzConfig.preset("robust"))  # before the model is wrapped or sharded
if many and options.fsdp:
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
elif many:
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = LipschitzMuon(model, lr=0.1, embedding_lr=0.05)  # after
for step in range(load_checkpoint(options.out, model, optimizer) or 0, steps):
    torch.manual_seed(
        step * 1000 + (dist.get_rank() if many else 0)
    )  # data of this step and process
    batch = torch.stack(
        [ids[i : i + length] for i in torch.randint(len(ids) - length, (8,)).tolist()]
    )
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * (1 - step / steps)
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % max(1, steps // 6) == 0:
        save_checkpoint(options.out, step + 1, model, optimizer)
        bound = certify(
            model
        ).lipschitz  # every process asks: of a sharded model they answer together
        if not many or dist.get_rank() == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, Lipschitz <= {bound:.4g}")
del model, optimizer  # before the process group that DDP holds on to
if many:
    dist.destroy_process_group()
