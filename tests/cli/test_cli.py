"""The commands certify, falsify and report print what is so, and exit with a code for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lip_plugin import (
    Certificate,
    LipschitzCallback,
    certify,
    falsify,
    project_,
    retrofit,
)
from lip_plugin.cli.charts import bars, interval, lines, number
from lip_plugin.cli.main import BAD_INPUT, FALSIFIED, OK, UNSUPPORTED, USAGE, main
from lip_plugin.cli.report import Report, render
from lip_plugin.config_values import LEGACY
from lip_plugin.integrations.huggingface.loading import load_saved_model
from lip_plugin.integrations.nanogpt.checkpoint import load_nanogpt
from lip_plugin.integrations.nanogpt.run import run as run_nanogpt
from lip_plugin.stated import LayerBound
from tests.support.families import tiny
from tests.support.oracles import paper, randomize_

STANDIN = Path(__file__).parents[1] / "support" / "nanogpt_standin"
QUICK = ["--rounds", "1", "--steps", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the Trainer with checkpoints, as a user leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    rows = [{"input_ids": [(s + t) % 7 for t in range(12)]} for s in range(8)]
    data = [{**row, "labels": row["input_ids"]} for row in rows]
    options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(str(folder), max_steps=6, logging_steps=1, save_steps=3, **options)
    Trainer(tiny("gpt2"), args, train_dataset=data, callbacks=[LipschitzCallback()]).train()
    return folder


@pytest.fixture(scope="module")
def checkpoint(run):
    return run / "checkpoint-6"


def answer(arguments, capsys):
    """The exit code, and the JSON object that must be all on stdout."""
    capsys.readouterr()
    code = main([*map(str, arguments), "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    values = json.loads(out)
    assert values["exit_code"] == code
    return code, values


def test_certify_gives_the_librarys_own_number(checkpoint, capsys):
    code, values = answer(["certify", checkpoint], capsys)
    certificate = certify(load_saved_model(checkpoint))
    assert code == OK
    assert values["certificate"]["lipschitz"] == certificate.lipschitz
    assert values["certificate"]["weights"] == certificate.weights
    assert values["compared"] is True
    code, values = answer(["certify", checkpoint, "--source", "caps"], capsys)
    assert (
        values["certificate"]["lipschitz"]
        == certify(load_saved_model(checkpoint), "caps").lipschitz
    )
    assert values["compared"] is False
    assert main(["certify", str(checkpoint)]) == OK
    text = capsys.readouterr().out
    assert f"Lipschitz <= {certificate.lipschitz:.6g}" in text
    assert "transformer.h.1.mlp" in text
    assert "belongs to these weights" in text


def test_every_checkpoint_has_its_own_certificate(run, capsys):
    found = {main(["certify", str(run / f"checkpoint-{step}")]) for step in (3, 6)}
    assert found == {OK}
    for step in (3, 6):
        shutil.copytree(run / f"checkpoint-{step}", run.parent / f"copy-{step}")
    shutil.copy(run / "checkpoint-6" / "certificate.json", run.parent / "copy-3")
    assert main(["certify", str(run.parent / "copy-3")]) == BAD_INPUT


def test_a_certificate_alone_and_beside_its_weights(checkpoint, tmp_path, capsys):
    shutil.copy(checkpoint / "certificate.json", tmp_path)
    code, values = answer(["certify", tmp_path / "certificate.json"], capsys)
    assert (code, values["compared"]) == (OK, False)
    code, values = answer(["certify", checkpoint / "certificate.json"], capsys)
    assert (code, values["compared"]) == (OK, True)


def test_errors_are_json_too_and_debug_shows_where(tmp_path, capsys):
    code, values = answer(["certify", tmp_path / "nothing"], capsys)
    assert code == BAD_INPUT
    assert values["error"]["kind"] == "CheckpointError"
    assert "nothing" in values["error"]["message"]
    with pytest.raises(Exception, match="nothing"):
        main(["certify", str(tmp_path / "nothing"), "--debug"])


def test_falsify_holds_against_the_certificate_and_not_against_a_claim_too_small(
    checkpoint, capsys
):
    code, values = answer(["falsify", checkpoint, *QUICK], capsys)
    assert code == OK
    assert values["claim_from"] == "certificate.json"
    assert 0 < values["lower_bound"] <= values["claim"]
    again = falsify(load_saved_model(checkpoint), 5, 5, tokens=17, seed=0)
    assert values["lower_bound"] == again.lower_bound
    small = 0.5 * values["lower_bound"]
    code, values = answer(["falsify", checkpoint, "--claim", small, *QUICK], capsys)
    assert code == FALSIFIED
    assert values["exceeded"] is True
    assert main(["falsify", str(checkpoint), "--claim", str(small), *QUICK]) == FALSIFIED
    assert "EXCEEDED" in capsys.readouterr().out


def test_more_rounds_find_no_less(checkpoint, capsys):
    found = [
        answer(["falsify", checkpoint, "--steps", "4", "--rounds", n], capsys)[1]
        for n in ("1", "3")
    ]
    assert found[0]["lower_bound"] <= found[1]["lower_bound"]


def test_a_plain_model_is_attacked_below_what_is_proven_now(tmp_path, capsys):
    randomize_(tiny("llama")).save_pretrained(tmp_path)
    code, values = answer(["falsify", tmp_path, *QUICK], capsys)
    assert code == OK
    assert values["claim_from"] == "proven now"


def test_the_installed_command_is_this_one():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.scripts]\nlip-plugin = "lip_plugin.cli.main:main"\n' in text


def test_every_exit_code_is_in_the_help(capsys):
    for arguments in (
        ["--help"],
        ["certify", "--help"],
        ["falsify", "--help"],
        ["report", "--help"],
    ):
        with pytest.raises(SystemExit) as raised:
            main(arguments)
        assert raised.value.code == 0
        text = capsys.readouterr().out
        for code in (OK, USAGE, BAD_INPUT, UNSUPPORTED, FALSIFIED):
            assert f"\n  {code}  " in text


def test_as_a_process_stdout_is_json_and_nothing_else(checkpoint):
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "lip_plugin",
        "certify",
        str(checkpoint),
        "--json",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == OK
    assert json.loads(result.stdout)["certificate"]["source"] == "weights"
    assert result.stderr == ""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nanogpt") / "repo"
    shutil.copytree(STANDIN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data.txt").write_text(
        "the quick brown fox jumps over the lazy dog; " * 60, encoding="utf-8"
    )
    run_nanogpt(folder, ["--max_iters=40"], {**LEGACY, "w_max": 1.5})
    return folder


class TestNanoGpt:
    def test_its_checkpoint_is_certified_and_attacked(self, checkout, capsys):
        out = checkout / "out"
        directory = ["--nanogpt-dir", checkout]
        stated = Certificate.from_json((out / "certificate.json").read_text())
        for path in (out, out / "ckpt.pt", out / "certificate.json"):
            code, values = answer(["certify", path, *directory], capsys)
            assert (code, values["compared"]) == (OK, True)
            assert values["certificate"]["lipschitz"] == stated.lipschitz
        assert answer(["falsify", out, *directory, *QUICK], capsys)[0] == OK
        assert answer(["report", out, *directory, *QUICK], capsys)[0] == OK
        assert "GPT (nanogpt)" in (out / "report.html").read_text()
        assert "model" not in sys.modules

    def test_a_plain_one_too(self, checkout, tmp_path):
        model = randomize_(tiny("nanogpt"))
        model_args = vars(model.config)
        torch.save({"model": model.state_dict(), "model_args": model_args}, tmp_path / "ckpt.pt")
        assert certify(load_nanogpt(tmp_path, checkout)) == certify(model)

    def test_bad_ones_are_refused(self, checkout, tmp_path, capsys):
        broken = shutil.copytree(checkout / "out", tmp_path / "out")
        directory = ["--nanogpt-dir", checkout]
        assert answer(["certify", broken], capsys)[0] == USAGE  # whose model.py?
        assert answer(["certify", broken, "--nanogpt-dir", tmp_path], capsys)[0] == USAGE
        assert answer(["certify", broken, "--stream", *directory], capsys)[0] == USAGE
        stored = torch.load(broken / "ckpt.pt")
        head = stored["model_args"]["n_head"]
        stored["model_args"]["n_head"] = 1
        torch.save(stored, broken / "ckpt.pt")
        code, values = answer(["certify", broken, *directory], capsys)
        assert code == BAD_INPUT
        assert f"n_head is 1 and was {head}" in values["error"]["message"]
        (broken / "lipschitz.json").unlink()
        assert answer(["certify", broken, *directory], capsys)[0] == BAD_INPUT
        (broken / "lipschitz.json").write_text("{")
        assert answer(["certify", broken, *directory], capsys)[0] == BAD_INPUT
        content = (broken / "ckpt.pt").read_bytes()
        for text in (content[: len(content) // 2], b"", b"abc"):
            (broken / "ckpt.pt").write_bytes(text)
            code, values = answer(["certify", broken, *directory], capsys)
            assert code == BAD_INPUT
            assert "ckpt.pt" in values["error"]["message"]
        torch.save({"weights": 1}, broken / "ckpt.pt")
        assert answer(["certify", broken, *directory], capsys)[0] == BAD_INPUT


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects what the page is made of."""

    VOID = ("meta", "br", "line", "rect", "circle", "polyline")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


class TestReport:
    def test_it_is_one_page_that_says_what_is_proven(self, run, tmp_path, capsys):
        out = tmp_path / "page.html"
        code, values = answer(["report", run, "--out", out, *QUICK], capsys)
        assert code == OK
        text = out.read_text(encoding="utf-8")
        page, words = Page(text), " ".join(Page(text).words)
        certificate = certify(load_saved_model(run / "checkpoint-6"))
        assert values["lipschitz"] == certificate.lipschitz
        assert number(certificate.lipschitz, "up") in words
        assert number(values["lower_bound"], "down") in words
        assert certificate.weights in words
        assert all(row.name in words for row in certificate.layers)
        assert all(a in words for a in certificate.assumptions)
        assert torch.__version__ in words
        assert page.tags.count("svg") >= 6  # five logged quantities and the norms
        assert text.isascii()

    def test_it_needs_no_network_and_no_script(self, run, tmp_path):
        main(["report", str(run), "--out", str(tmp_path / "page.html"), *QUICK])
        page = Page((tmp_path / "page.html").read_text())
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        for name, value in page.attributes:
            assert name not in ("src", "href", "srcset")
            assert not name.startswith("on")
            if name != "xmlns":
                assert "://" not in (value or "")
        assert "url(" not in (tmp_path / "page.html").read_text()

    def test_names_cannot_write_html(self):
        evil = '<script>alert("x")</script>\'">&'
        row = LayerBound(evil, 1.0, 2.0, 0.3)
        c = Certificate(
            2.0, 0.31, 1.0, evil, evil, (row,), 1.0, 8, 8, 1.0, (evil,), evil, evil, {evil: evil}
        )
        page = render(
            Report(evil, c, evil, [(evil, 0.5)], [{"step": 1, "loss": 2.0}], versions={evil: evil})
        )
        assert "<script" not in page
        assert Page(page).words.count(evil) >= 5
        assert "script" not in Page(page).tags

    def test_numbers_that_are_not_finite_leave_a_page(self):
        row = LayerBound("layer", 1.0, float("inf"), float("inf"))
        zero = LayerBound("zero", 1.0, 0.0, -float("inf"))
        inf = float("inf")
        c = Certificate(inf, inf, 1.0, "", "", (zero, row), inf, 8, 8, inf, (), "model")
        history = [
            {"step": 1, "loss": float("nan")},
            {"loss": 3},
            {"step": 2, "eval_loss": "x"},
            "row",
            {},
        ]
        text = render(Report("run", c, c, [("layer", float("inf"))], history))
        assert "nan" not in text
        assert "infinite" in " ".join(Page(text).words)

    def test_a_bound_is_shown_rounded_up_and_what_is_attained_rounded_down(self):
        assert number(1.23401, "up") == "1.235"
        assert number(1.23499, "down") == "1.234"
        assert number(1.0, "up") == number(1.0, "down") == "1"
        assert float(number(1e-30 / 3, "up")) > 1e-30 / 3 > float(number(1e-30 / 3, "down"))

    def test_a_run_without_a_log_or_with_a_bad_one(self, checkpoint, tmp_path, capsys):
        folder = shutil.copytree(checkpoint, tmp_path / "model")
        (folder / "trainer_state.json").unlink()
        assert answer(["report", folder, *QUICK], capsys)[0] == OK
        assert "No log of a Trainer" in (folder / "report.html").read_text()
        (folder / "trainer_state.json").write_text("{")
        assert answer(["report", folder, *QUICK], capsys)[0] == BAD_INPUT

    def test_an_exceeded_bound_would_be_said(self):
        model = tiny("gpt2")
        retrofit(model, paper())
        project_(randomize_(model))
        attack, c = falsify(model, 2, 3), certify(model)
        wrong = Certificate(**{**vars(c), "lipschitz": attack.lower_bound / 2})
        report = Report("run", wrong, "none", attack=attack)
        assert report.falsified
        assert "the certificate is wrong" in render(report)
        assert not Report("run", c, "none", attack=attack).falsified

    def test_without_matplotlib_it_says_what_to_install(self, checkpoint, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        code, values = answer(["report", checkpoint, *QUICK], capsys)
        assert code == UNSUPPORTED
        assert 'pip install "lip_plugin[plots]"' in values["error"]["message"]
        assert answer(["certify", checkpoint], capsys)[0] == OK

    def test_the_same_numbers_give_the_same_chart(self):
        def charts():
            yield lines({"a": [(1, 1.0), (2, 500.0)]}, "t", "nats", limit=("cap", 1.0))
            yield bars([("a", 0.5)], "t", "x", limit=("cap", 1.0))
            yield interval(("lower", 0.3), ("upper", 40.0), "t", "x")

        assert list(charts()) == list(charts())

    def test_names_are_shown_as_they_are(self):
        """No part of a name is mathematics to matplotlib, and no letter needs its font."""
        name = "layer.$x^2$.<b>.\u00e9\u4e2d"
        chart = bars([(name, 0.5)], "t")
        assert name in Page(chart).words
        assert chart.isascii()

    def test_charts_of_nothing_are_nothing(self):
        assert (
            lines({"a": []}, "t") == lines({"a": [(1, float("nan"))]}, "t") == bars([], "t") == ""
        )
        Page(lines({"one": [(1, 2.0)], "two": [(1, 2.0), (2, 2.0)]}, "t", limit=("cap", 1.0)))


@pytest.mark.parametrize(
    "words", [["--help"], ["certify", "--help"], ["certify", "certificate.json"]]
)
def test_light_words_import_no_torch(words: list[str], tmp_path: Path) -> None:
    """Help and a certificate without weights are answered without torch, which takes seconds."""
    model = tiny("gpt2")
    (tmp_path / "certificate.json").write_text(certify(model).to_json())
    code = (
        "import sys; from lip_plugin.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout


def test_the_face_imports_what_is_asked_for() -> None:
    """`import lip_plugin` alone costs no torch, and every public name is there."""
    code = (
        "import sys, lip_plugin; assert 'torch' not in sys.modules\n"
        "missing = [n for n in lip_plugin.__all__ if getattr(lip_plugin, n, None) is None]\n"
        "sys.exit(f'missing {missing}' if missing else 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
