"""How long does one wait before anything happens: imports, and the command line?

    python benchmarks/start_up.py
    python benchmarks/start_up.py --smoke

Each call is a process of its own, all in turns. Processor time, which a busy machine disturbs less
than the clock, is that of the process and of what it starts. Each figure is a median, and beside it
stands what it is over: Python's own start, or torch and transformers.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Table, character_gpt2, finish, headline, machine, medians, parsed, parser
from tqdm import tqdm

from lip_plugin import certify

_EVERYTHING = "import torch, transformers, lip_plugin; [getattr(lip_plugin, n) for n in {names}]"
_MAIN = "import sys; from lip_plugin.cli.main import main; main(sys.argv[1:])"


def seconds(words: list[str]) -> float:
    """Processor seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *words], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    options = parsed(parser(__doc__, repeats=7), repeats=1)
    where = machine()
    headline("start-up, processor seconds", where)
    with tempfile.TemporaryDirectory() as folder:
        certificate = Path(folder, "certificate.json")
        certificate.write_text(certify(character_gpt2(64, 64, 3, 16)).to_json())
        names = ["certify", "retrofit", "LipschitzMuon", "LipschitzCallback"]
        calls = {
            "python": (["-c", "pass"], None),
            "import lip_plugin": (["-c", "import lip_plugin"], "python"),
            "lip-plugin --help": (["-c", _MAIN, "--help"], "python"),
            "lip-plugin certify FILE": (["-c", _MAIN, "certify", str(certificate)], "python"),
            "torch and transformers": (
                ["-c", "import torch, transformers; from transformers import Trainer"],
                "python",
            ),
            "... and lip_plugin": (
                ["-c", f"from transformers import Trainer; {_EVERYTHING.format(names=names)}"],
                "torch and transformers",
            ),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in tqdm(range(options.repeats), desc="rounds"):
            for name, (words, _) in calls.items():
                found[name].append(seconds(words))
    middle = medians(found)
    table = Table(("what", "<24"), ("seconds", "7.2f"), ("over", "<22"), ("more", "6.2f"))
    rows = {}
    for name, (_, base) in calls.items():
        more = middle[name] - middle[base] if base else 0.0
        rows[name] = {"seconds": middle[name], "over": base, "more": more}
        table.row(name, middle[name], base or "", more)
    finish("start_up", where, rows=rows, repeats=options.repeats)


if __name__ == "__main__":
    main()
