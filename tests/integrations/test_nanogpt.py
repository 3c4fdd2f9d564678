"""An untouched checkout of nanoGPT trains, resumes and samples under the constraint."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from lip_plugin import Certificate, LipschitzConfig, LipschitzMuon, certify
from lip_plugin.config_values import LEGACY
from lip_plugin.errors import CertificateError, ConfigError, UnsupportedModelError
from lip_plugin.integrations.nanogpt.patch import Options, patch
from lip_plugin.integrations.nanogpt.run import main, run
from lip_plugin.model.layers import constrained_modules
from lip_plugin.surgery.state import find_retrofit
from tests.support.oracles import paper, worst_over_cap

STANDIN = Path(__file__).parents[1] / "support" / "nanogpt_standin"
TEXT = "the quick brown fox jumps over the lazy dog; " * 60
GELU_SLOPE = 1.12890415
ITERS = 40


def checkout(folder: Path) -> Path:
    shutil.copytree(STANDIN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data.txt").write_text(TEXT, encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        f.name: hashlib.sha256(f.read_bytes()).hexdigest()
        for f in folder.glob("*.*")
        if f.is_file()
    }


def standin_model(name: str = "standin_model") -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STANDIN / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses looks the module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run through the parts of the command line.

    Gives the checkout, the globals of train.py, and the digests of the checkout before.
    """
    folder = checkout(tmp_path_factory.mktemp("nanogpt") / "repo")
    before = digests(folder)
    result = run(folder, ["--max_iters=40"], {**LEGACY, "w_max": 1.5, "lr": 0.1})
    return folder, result, before


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained checkout, free to be changed."""
    return Path(shutil.copytree(trained[0], tmp_path / "repo"))


def test_the_checkout_is_untouched_and_so_is_this_process(trained):
    folder, _, before = trained
    assert digests(folder) == before
    assert "model" not in sys.modules
    assert str(folder) not in sys.path
    assert torch.save.__module__ == torch.load.__module__ == "torch.serialization"


def test_it_trains_with_our_optimizer_and_the_loss_falls(trained):
    _, result, _ = trained
    assert isinstance(result["optimizer"], LipschitzMuon)
    assert result["losses"][0] > 3.0
    assert result["losses"][-1] < 0.7 * result["losses"][0]


def test_the_default_options_train_as_well_at_a_bound_of_one(tmp_path):
    folder = checkout(tmp_path / "repo")
    result = run(folder, ["--max_iters=30"], {"lr": 0.1})
    assert result["losses"][-1] < 0.7 * result["losses"][0]
    model = result["raw_model"]
    assert find_retrofit(model)[1].config.attention_scale == 0
    # four maps in each layer and the head, each within CAP_SLACK of its cap
    assert certify(model).lipschitz <= 40 * 1.001**20
    stored = json.loads((folder / "out" / "lipschitz.json").read_text())
    assert "auto" not in [v for k, v in stored.items() if k != "init"]


def test_every_block_is_within_its_cap_after_the_run(trained):
    _, result, _ = trained
    # 1e-3 is the promise for float32; the projections themselves are nearer
    assert worst_over_cap(result["raw_model"]) <= 1.0 + 1e-3
    roles = {s.role for _, m in constrained_modules(result["raw_model"]) for s in m.layout.segments}
    assert roles == {"q", "k", "v", "out", "up", "down", "head", "token", "position"}


def test_their_schedule_moves_all_rates_in_proportion(trained):
    _, result, _ = trained
    groups = {g["kind"]: i for i, g in enumerate(result["optimizer"].param_groups)}
    assert set(groups) == {"matrix", "row", "adamw"}
    first, last = result["rates"][0], result["rates"][-1]
    assert first[groups["matrix"]] == pytest.approx(0.1)
    assert first[groups["adamw"]] == pytest.approx(1e-3)
    for start, end in zip(first, last, strict=True):
        assert end / start == pytest.approx(0.1)  # min_lr over learning_rate


def test_certificate_and_choices_lie_beside_the_checkpoint(trained):
    folder, result, _ = trained
    written = Certificate.from_json(
        (folder / "out" / "certificate.json").read_text(encoding="utf-8")
    )
    assert written.source == "weights"
    assert 0 < written.lipschitz < math.inf
    assert not list((folder / "out").glob("*.tmp"))
    stored = json.loads((folder / "out" / "lipschitz.json").read_text(encoding="utf-8"))
    assert stored["w_max"] == 1.5
    assert stored["lr"] == 0.1
    assert stored["norms"] == "remove"
    assert set(torch.load(folder / "out" / "ckpt.pt")) == {
        *("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
    }
    assert result["iter_num"] == ITERS + 1


def test_options_are_the_configs_fields_and_the_rates():
    assert Options.from_dict({"w_max": 2.0}).config == LipschitzConfig(w_max=2.0)
    assert Options.from_dict({"overrides": {}}).config.overrides == {}
    assert Options.from_dict(Options(momentum=0.9).to_dict()) == Options(momentum=0.9)


def test_certifying_does_not_change_what_is_trained(trained, copy, monkeypatch):
    monkeypatch.setattr("lip_plugin.integrations.nanogpt.run._Run._certify", lambda *a: None)
    again = run(copy, ["--max_iters=40", "--out_dir=other"], {**LEGACY, "w_max": 1.5, "lr": 0.1})
    assert again["losses"] == trained[1]["losses"]


def test_a_run_resumes_without_repeating_the_options(trained, copy):
    result = run(copy, ["--init_from=resume", "--max_iters=60"])
    assert result["iter_num"] == 61
    assert len(result["losses"]) == 21
    config = find_retrofit(result["raw_model"])[1].config
    assert config.w_max == 1.5
    assert worst_over_cap(result["raw_model"]) <= 1.0 + 1e-3
    # the first loss after resuming is that of a trained model, on a batch of its own
    assert result["losses"][0] < 1.1 * max(trained[1]["losses"][-5:])


def test_a_resumed_run_goes_on_exactly_where_it_was(copy):
    stored = torch.load(copy / "out" / "ckpt.pt")
    result = run(copy, ["--init_from=resume", "--max_iters=39"])  # no step is left: iter_num is 40
    state = result["raw_model"].state_dict()
    assert state.keys() == stored["model"].keys()
    assert all(torch.equal(state[k], v) for k, v in stored["model"].items())
    moments = result["optimizer"].state_dict()["state"]
    for index, values in stored["optimizer"]["state"].items():
        assert all(torch.equal(moments[index][k], v) for k, v in values.items())
    groups = result["optimizer"].state_dict()["param_groups"]
    assert groups == stored["optimizer"]["param_groups"]


def test_a_smaller_block_size_can_be_resumed_for_sampling(copy):
    model = run(copy, ["--init_from=resume", "--max_iters=39"])["raw_model"]
    model.crop_block_size(8)
    assert worst_over_cap(model) <= 1.0 + 1e-3
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 12).shape == (1, 13)


def test_sample_runs_on_the_checkpoint(copy):
    assert main(["--nanogpt-dir", str(copy), "sample.py", "--max_new_tokens=25"]) == 0
    assert len((copy / "out" / "sample.txt").read_text(encoding="utf-8")) == 26


@pytest.mark.parametrize("norms", ["remove", "keep"])
def test_a_plain_load_of_the_checkpoint_fails_closed(tmp_path, norms):
    folder = checkout(tmp_path / "repo")
    run(folder, ["--max_iters=1", "--eval_interval=1"], {"norms": norms})
    stored = torch.load(folder / "out" / "ckpt.pt")
    module = standin_model()
    plain = module.GPT(module.GPTConfig(**stored["model_args"]))
    with pytest.raises(RuntimeError, match="key"):
        plain.load_state_dict(stored["model"])
    resumed = run(folder, ["--init_from=resume", "--max_iters=0"])["raw_model"]
    assert resumed.state_dict().keys() == stored["model"].keys()


@pytest.mark.parametrize("bias", [False, True])
def test_logits_equal_an_explicit_computation_of_the_recipe(bias):
    module = standin_model()
    undo = patch(module.GPT, paper(w_max=1.5, logit_scale=1.0))
    torch.manual_seed(3)
    model = module.GPT(module.GPTConfig(n_layer=3, n_head=4, bias=bias)).double().eval()
    undo()
    with torch.no_grad():  # the initial output maps are zero, which would hide most of the network
        for p in model.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    ids = torch.randint(32, (2, 16))
    with torch.no_grad():
        logits, _ = model(ids, ids)
        expected = recipe(model, ids)
    # float64 rounding through 6 sub-blocks stays many orders below this
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-10


def recipe(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits by arXiv 2507.13338's equations, straight from the weights."""
    w = dict(model.named_parameters())
    heads, layers, tokens = model.config.n_head, model.config.n_layer, ids.shape[1]
    a, d_head = 1.0 / (2 * layers), model.config.n_embd // heads

    def linear(name, x, bias_scale=1.0):
        bias = w.get(f"{name}.bias")
        return x @ w[f"{name}.weight"].T + (0.0 if bias is None else bias_scale * bias)

    # The recipe has no biases. Where there are some, those of attention count d_head^(1/4) times.
    # For 1/sqrt(d_head) becomes 1/d_head by scaling what enters q, k and v, and not what leaves.
    b = d_head**0.25
    future = torch.ones(tokens, tokens).triu(1).bool()
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:tokens]
    for i in range(layers):
        h = f"transformer.h.{i}"
        parts = linear(f"{h}.attn.c_attn", x, b).split(model.config.n_embd, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, d_head)).transpose(1, 2) for t in parts)
        scores = (q @ k.mT / d_head).masked_fill(future, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = (1 - a) * x + a * linear(f"{h}.attn.c_proj", mixed, b) / 3
        hidden = F.gelu(linear(f"{h}.mlp.c_fc", x)) / GELU_SLOPE
        x = (1 - a) * x + a * linear(f"{h}.mlp.c_proj", hidden)
    return x @ w["lm_head.weight"].T


def test_pretrained_weights_need_a_word_about_norms(tmp_path, capsys):
    folder = checkout(tmp_path / "repo")
    arguments = ["--nanogpt-dir", str(folder), "--init_from=gpt2", "--max_iters=2"]
    assert main(arguments) == 1
    assert "--lip_norms=keep" in capsys.readouterr().err
    result = run(folder, ["--init_from=gpt2", "--max_iters=2"], {"norms": "keep"})
    assert worst_over_cap(result["raw_model"]) <= 1.0 + 1e-3
    kept = result["raw_model"].transformer.h[0].mlp.c_proj.weight.detach()
    assert float(kept.norm()) > 1.0  # a fresh model's is zero, and two steps move it by less


def test_pretrained_weights_are_within_the_caps_before_any_step():
    module = standin_model()
    undo = patch(module.GPT, paper(w_max=0.2, norms="keep"))
    assert worst_over_cap(module.GPT.from_pretrained("gpt2")) <= 1.0 + 1e-3
    undo()
    assert find_retrofit(module.GPT.from_pretrained("gpt2")) is None


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--lip_wmax=2"], 2, "--lip_w_max"),
        (["--lip_w_max=-1"], 1, "w_max"),
        (["--lip_w_max=many"], 1, "w_max"),
        (["--lip_lr=0"], 1, "lr"),
        (["--lip_momentum=1"], 1, "momentum"),
        (["--lip_untie_head=maybe"], 1, "untie_head"),
        (["--lip_method=magic"], 1, "soft_cap"),
        (["--lip_overrides={'nothing': 2.0}"], 1, "matches no layer"),
        (["--learning_rate=0.0"], 1, "learning_rate"),
    ],
)
def test_bad_options_are_refused_by_name(tmp_path, capsys, arguments, status, words):
    folder = checkout(tmp_path / "repo")
    command = ["--nanogpt-dir", str(folder), *arguments, "--max_iters=1"]
    if status == 2:
        with pytest.raises(SystemExit) as exit:
            main(command)
        assert exit.value.code == 2
    else:
        assert main(command) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_options_other_than_the_checkpoints_are_refused(copy, capsys):
    command = ["--nanogpt-dir", str(copy), "--init_from=resume", "--max_iters=39"]
    assert main([*command, "--lip_w_max=3"]) == 1
    assert "--lip_w_max=3 (it has 1.5)" in capsys.readouterr().err
    assert main([*command, "--lip_w_max=1.5", "--lip_norms=remove"]) == 0


def test_a_checkpoint_that_is_not_ours_is_refused(copy, capsys):
    command = ["--nanogpt-dir", str(copy), "--init_from=resume", "--max_iters=39"]
    (copy / "out" / "lipschitz.json").write_text("[1", encoding="utf-8")
    assert main(command) == 1
    assert "lipschitz.json cannot be read" in capsys.readouterr().err
    (copy / "out" / "lipschitz.json").unlink()
    assert main(command) == 1
    assert "plain nanoGPT checkpoint" in capsys.readouterr().err


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no model\.py and no train\.py"):
        run(tmp_path)
    folder = checkout(tmp_path / "repo")
    (folder / "sample.py").unlink()
    with pytest.raises(ConfigError, match=r"no sample\.py"):
        run(folder, ["sample.py"])
    (folder / "train.py").write_text("done = True\n", encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="nothing was constrained"):
        run(folder)
    (folder / "model.py").write_text("", encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match="no class GPT"):
        run(folder)


def test_a_class_is_patched_once_and_given_back():
    module = standin_model()
    undo = patch(module.GPT, paper(w_max=2.0), lr=0.02)
    with pytest.raises(ConfigError, match="patched already"):
        patch(module.GPT)
    model = module.GPT(module.GPTConfig(n_layer=1))
    groups = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu").param_groups
    assert {g["lr"] for g in groups} == {1e-3}
    assert groups[0]["lr_ratio"] == pytest.approx(20.0)
    undo()
    assert find_retrofit(module.GPT(module.GPTConfig(n_layer=1))) is None


def test_no_certificate_is_left_beside_a_checkpoint_it_does_not_belong_to(
    copy, monkeypatch, caplog
):
    def refuse(model, source):
        raise CertificateError("no proof")

    monkeypatch.setattr("lip_plugin.integrations.nanogpt.run.certify", refuse)
    run(copy, ["--init_from=resume", "--max_iters=40"])
    assert "no proof" in caplog.text
    assert (copy / "out" / "ckpt.pt").exists()
    assert not (copy / "out" / "certificate.json").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "w_max",
        "method",
        "norms",
        "overrides",
        "lr",
        "embedding_lr",
        "adamw_lr",
        "momentum",
    ):
        assert f"--lip_{name} " in text
