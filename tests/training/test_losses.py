"""MarginLoss is what its definition says, works in Trainer, and widens margins."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from lip_plugin import LipschitzCallback, LipschitzMuon, MarginLoss, retrofit
from lip_plugin.errors import ConfigError, NotRetrofittedError
from tests.support.families import data_for, tiny
from tests.support.oracles import paper


def model_of(family: str = "gpt2", **config):
    model = tiny(family, hidden_size=16, num_hidden_layers=1)
    retrofit(model, paper(**config))
    return model


@pytest.mark.parametrize("family", ["gpt2", "bert", "bert_classifier", "gpt2_classifier"])
@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_it_is_the_cross_entropy_of_lowered_right_logits(family, margin):
    gpt2 = family.startswith("gpt2")
    model = model_of(family, logit_scale=3.0) if gpt2 else model_of(family)
    loss = MarginLoss(model.train(), margin)
    scale = 3.0 if gpt2 else 1.0
    shape = (4,) if family.endswith("_classifier") else (2, 5)
    classes = 5 if family.endswith("_classifier") else 67
    logits = torch.randn(*shape, classes, dtype=torch.float64)
    labels = torch.randint(classes, shape)
    labels.view(-1)[1] = -100
    z, y = (logits[:, :-1], labels[:, 1:]) if family == "gpt2" else (logits, labels)
    total, count = 0.0, 0
    for row, right in zip(z.reshape(-1, classes), y.reshape(-1), strict=True):
        if right == -100:
            continue
        lead = row[right] - margin * scale
        others = torch.cat([row[:right], row[right + 1 :], lead[None]])
        total, count = total + float(torch.logsumexp(others, 0) - lead), count + 1
    assert float(loss({"logits": logits}, labels)) == pytest.approx(
        total / count, rel=1e-12
    )  # float64 roundings
    assert float(loss(logits, labels, num_items_in_batch=11)) == pytest.approx(
        total / 11, rel=1e-12
    )
    model.eval()
    assert float(loss(logits, labels, num_items_in_batch=11)) == float(loss(logits, labels))
    plain = F.cross_entropy(z.reshape(-1, classes), y.reshape(-1))
    assert float(loss(logits, labels)) == pytest.approx(float(plain), rel=1e-12)


def test_trainer_takes_it_and_its_eval_loss_is_the_plain_one(tmp_path):
    model = model_of()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    data = data_for("gpt2")
    loss = MarginLoss(model, 0.3)
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=loss,
        callbacks=[LipschitzCallback()],
    )
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    ids = torch.tensor([row["input_ids"] for row in data])
    with torch.no_grad():
        assert found == pytest.approx(
            float(model.eval()(ids, labels=ids).loss), rel=1e-5
        )  # float32, in batches


def test_training_with_a_margin_widens_margins():
    """Training with a margin widens margins, on data that can be learned.

    The margin is the smallest lead among right predictions, at the network's own scale.
    """
    leads = []
    ids = torch.tensor([row["input_ids"] for row in data_for("gpt2")])
    for margin in (0.0, 0.5):
        model = model_of(logit_scale=40.0).train()
        optimizer, loss = LipschitzMuon(model, lr=0.1), MarginLoss(model, margin)
        for _ in range(60):
            loss(model(ids), ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        logits = model.eval()(ids).logits[:, 4:-1] / 40.0
        right = logits.gather(-1, ids[:, 5:, None])[..., 0]
        best = logits.scatter(-1, ids[:, 5:, None], -math.inf).amax(-1)
        leads.append(float((right - best).detach().min()))
    assert leads[1] > 1.2 * leads[0] > 0


def test_what_makes_no_sense_is_refused():
    for margin in (-0.1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="margin"):
            MarginLoss(model_of(), margin)
    with pytest.raises(NotRetrofittedError):
        MarginLoss(tiny("gpt2"), 0.1)
