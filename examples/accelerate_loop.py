"""A loop of your own with accelerate: caps, checkpoints and a certificate on one process or many.

python examples/accelerate_loop.py
torchrun --nproc_per_node 2 examples/accelerate_loop.py
accelerate launch --config_file integrations/accelerate/fsdp2_8.yaml examples/accelerate_loop.py
"""

import argparse
from pydoc_data import topics

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
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
parser.add_argument("--steps", type=int, default=300)
parser.add_argument("--out", default="runs/accelerate_loop")
parser.add_argument("--smoke", action="store_true")
options = parser.parse_args()
steps, length = (6, 32) if options.smoke else (options.steps, 128)

accelerator = Accelerator(cpu=not torch.cuda.is_available())
set_seed(0)
text = "\n".join(topics.topics.values())
vocabulary = sorted(set(text))
ids = torch.tensor([vocabulary.index(c) for c in text])
blocks = ids[: len(ids) // length * length].view(-1, length)
loader = torch.utils.data.DataLoader(blocks, batch_size=8, shuffle=True, drop_last=True)

sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": length}
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=len(vocabulary), **sizes, bos_token_id=None, eos_token_id=None)
)
retrofit(model, LipschitzConfig.preset("robust"))
optimizer = LipschitzMuon(model, lr=0.1, embedding_lr=0.05)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
optimizer.optimizer.share_work(model)  # DDP: each process steps a share of the matrices
schedule = torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, 1.0, 0.0, steps)

extra = {"schedule": schedule.state_dict()}
step = load_checkpoint(options.out, model, optimizer, extra) or 0
schedule.load_state_dict(extra["schedule"])
batches = iter(loader)
while step < steps:
    batch = next(batches, None)
    if batch is None:
        batches = iter(loader)
        continue
    loss = model(input_ids=batch, labels=batch).loss
    accelerator.backward(loss)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    step += 1
    if step % max(1, steps // 6) == 0:
        save_checkpoint(options.out, step, model, optimizer, {"schedule": schedule.state_dict()})
        accelerator.print(
            f"step {step}: loss {loss.item():.3f}, Lipschitz <= {certify(model).lipschitz:.4g}"
        )
accelerator.end_training()
