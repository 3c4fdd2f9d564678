"""Train a small ViT under enforced Lipschitz constants, and prove its accuracy under pixel changes.

    python examples/train_vit.py                     # scikit-learn's digits, 8 x 8; offline
    python examples/train_vit.py --dataset cifar10   # any image data set of the Hugging Face hub

A twin of the same size is trained without constraints. For both, the table says which share of
held-out images is classified right (clean), provably so under every change of 2-norm eps (proven),
and under an attack (attacked), in units of pixels in [-1, 1]. The run folder holds model/,
table.json and figure.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from lip_plugin import (
    LipschitzCallback,
    LipschitzConfig,
    attacked_accuracy,
    certified_accuracy,
    certify,
)
from lip_plugin.integrations.plots import plot_certified_accuracy

EPS = (0.05, 0.1, 0.2, 0.5, 1.0)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--dataset", help="an image data set of the hub; scikit-learn's digits without"
    )
    parser.add_argument("--out", default="runs/vit", help="the run folder")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    for name, default, text in (
        ("steps", 300, "optimizer steps"),
        ("batch", 64, "images in a step"),
        ("width", 64, "of the model"),
        ("layers", 1, "of the model"),
        ("patch", 4, "height and width of a patch, in pixels"),
        ("w-max", 2.0, "cap on every block, RMS->RMS norm"),
        ("head-max", 8.0, "cap on the classifier"),
        ("attention-scale", 0.3, "attention logits are this times q.k / d_head"),
        ("value-scale", 2.0, "factor on the attention branch"),
        ("residual", 0.5, "a of x <- (1-a) x + a f(x)"),
        ("lr", 0.05, "RMS->RMS norm per step; the twin's AdamW takes 1e-3"),
        ("images", 200, "held-out images that are certified and attacked"),
        ("refine", 9, "backward passes on an image at most"),
        ("attack-steps", 40, "of the attack"),
    ):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.width, options.images, options.attack_steps = 6, 32, 8, 3
    return options


def load(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [n, channels, height, width] in [-1, 1] and labels; the same held out."""
    if not options.dataset:
        found = load_digits()
        images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8.0 - 1.0
        labels, order = torch.tensor(found.target), torch.randperm(len(images))
        train, held_out = order[: 4 * len(order) // 5], order[4 * len(order) // 5 :]
        return images[train], labels[train], images[held_out], labels[held_out]
    parts: list[Tensor] = []
    for split in ("train", "test"):
        data = load_dataset(options.dataset, split=split)
        kinds = {str(feature): name for name, feature in data.features.items()}
        image = next(name for kind, name in kinds.items() if kind.startswith("Image"))
        label = next(name for kind, name in kinds.items() if kind.startswith("ClassLabel"))
        pixels = torch.stack([torch.tensor(row) for row in data.with_format("torch")[image]])
        parts += [pixels.float() / 127.5 - 1.0, torch.tensor(data[label])]
    return parts[0], parts[1], parts[2], parts[3]


def rows(images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels)]


def train(
    images: Tensor, labels: Tensor, options: argparse.Namespace, config: LipschitzConfig | None
) -> ViTForImageClassification:
    """A ViT of the stock library through the stock Trainer; under caps if there is a config."""
    set_seed(0)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=images.shape[-1],
            patch_size=options.patch,
            num_channels=images.shape[1],
            hidden_size=options.width,
            intermediate_size=2 * options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            num_labels=int(labels.max()) + 1,
        )
    )
    args = TrainingArguments(
        output_dir=options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr if config else 1e-3,
        lr_scheduler_type="linear",
        logging_steps=max(1, options.steps // 6),
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    callbacks = [LipschitzCallback(config)] if config else []
    Trainer(model=model, args=args, train_dataset=rows(images, labels), callbacks=callbacks).train()
    return model.eval()


def main() -> None:
    options = parse()
    set_seed(0)
    out = Path(options.out)
    images, labels, held_out, truth = load(options)
    config = LipschitzConfig(
        method="soft_cap",
        activation=None,
        w_max=options.w_max,
        overrides={"classifier": options.head_max},
        logit_scale=1.0,
        biases="drop",
        attention_scale=options.attention_scale,
        value_scale=options.value_scale,
        residual=options.residual,
    )
    constrained = train(images, labels, options, config)
    constrained.save_pretrained(out / "model")
    models = {"constrained": constrained, "unconstrained": train(images, labels, options, None)}
    curves, table = {}, {}
    for name, model in models.items():
        device = model.device
        parts = zip(held_out[: options.images].split(50), truth[: options.images].split(50))
        batches = [{"pixel_values": x.to(device), "labels": y.to(device)} for x, y in parts]
        proven = certified_accuracy(model, batches, EPS, norm="pixel_l2", refine=options.refine)
        attacked = attacked_accuracy(
            model, batches, EPS, norm="pixel_l2", steps=options.attack_steps
        )
        curves[name] = proven, attacked
        table[name] = {
            "clean": proven.clean,
            "proven": proven.accuracy,
            "attacked": attacked.accuracy,
        }
        print(f"\n{name}: clean {proven.clean:.1%} of {proven.right.shape[1]} images")
        print(f"log10 of the proven Lipschitz bound {certify(model).log10_lipschitz:.2f}")
        print(f"{'eps':>6} {'proven':>9} {'attacked':>9}")
        for eps, low, high in zip(EPS, proven.accuracy, attacked.accuracy):
            print(f"{eps:>6} {low:>9.1%} {high:>9.1%}")
    (out / "table.json").write_text(json.dumps({"eps": EPS, **table}, indent=1))
    plot_certified_accuracy(curves, out / "figure.png", changed="2-norm of the image's change")
    print(f"\nfigure and table in {out}")


if __name__ == "__main__":
    main()
