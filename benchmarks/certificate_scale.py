"""What does a certificate cost, in time and memory, as models grow?

    python benchmarks/certificate_scale.py            # about ten minutes on one core
    python benchmarks/certificate_scale.py --smoke    # seconds

GPT-2 small is certified in memory, and growing models are streamed from files. Streamed models
have the architecture of GPT-2, retrofitted, and random bfloat16 weights. These are written layer by
layer to sharded safetensors in a temporary folder (2.8 GB for the largest), which is deleted
afterwards.

Each case runs in a process of its own. Its peak memory is VmHWM (Linux; ru_maxrss elsewhere), the
largest resident size, which counts pages of the mapped weight files too. "before" is the resident
size once all is imported, and "over" is their difference. Wall time suffers from whatever else runs
on the machine, processor time hardly does.

For comparison, float64 singular values of all blocks that the certificate measures are timed on
`--svd-layers` layers and on 4096 rows of the head, and extrapolated in proportion to all layers and
rows. These blocks are transposed to tall, which LAPACK prefers. Beside them are whole weights as
stored, which is what a plain loop over the parameters would take.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import MIB, Table, finish, headline, machine, output_of, parser, recipe
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

from lip_plugin import certify, retrofit
from lip_plugin.certificate.fingerprint import fingerprint, stored_tensors
from lip_plugin.integrations.huggingface.loading import certify_streamed
from lip_plugin.linalg.norms import sigma_max_exact, sigma_max_upper

# (layers, width, heads)
SIZES = {"124M": (12, 768, 12), "355M": (24, 1024, 16), "1.3B": (24, 2048, 32)}
SMOKE = {"tiny": (2, 64, 4), "small": (6, 64, 4)}
_HEAD_ROWS = 4096


def config_of(layers: int, width: int, heads: int, vocabulary: int) -> GPT2Config:
    return GPT2Config(
        n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=1024
    )


def memory(field: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process in bytes; the peak where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def write_model(folder: Path, layers: int, width: int, heads: int, vocabulary: int) -> int:
    """Write random bfloat16 weights of a retrofitted GPT-2, one shard for each layer.

    Returns the number of parameters.
    """
    with torch.device("meta"):
        model = GPT2LMHeadModel(config_of(layers, width, heads, vocabulary))
    retrofit(model, recipe(), _loading=True)  # a skeleton: its values come from the files
    model.config.architectures, model.config.dtype = ["GPT2LMHeadModel"], torch.bfloat16
    model.config.save_pretrained(folder)
    shards: dict[str, list[str]] = {}
    tensors = stored_tensors(model)
    for name in tensors:
        layer = name.split(".")[2] if name.startswith("transformer.h.") else "rest"
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in shards.items():
        values = {
            n: (torch.randn(tensors[n].shape, generator=generator) * 0.02).to(torch.bfloat16)
            for n in names
        }
        save_file(values, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(t.numel() for t in tensors.values())


def measured(call: Any) -> dict[str, Any]:
    """Wall and processor seconds of a call, memory before and at its peak, and the bound."""
    before, wall, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    certificate = call()
    peak = memory("VmHWM")
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "before_mib": before / MIB,
        "peak_mib": peak / MIB,
        "over_mib": (peak - before) / MIB,
        "log10_lipschitz": certificate.log10_lipschitz,
    }


def in_memory(shape: tuple[int, int, int], vocabulary: int) -> dict[str, Any]:
    """certify() of a fresh model: the first call, which also compares it, and a later one."""
    model = GPT2LMHeadModel(config_of(*shape, vocabulary))
    retrofit(model, recipe())
    first = measured(lambda: certify(model))
    again = measured(lambda: certify(model))
    start = time.process_time()
    fingerprint(model)
    hashing = time.process_time() - start
    start = time.process_time()
    certify(model, "caps")
    caps = time.process_time() - start
    parameters = sum(p.numel() for p in model.parameters())
    later = {"again_wall_s": again["wall_s"], "again_cpu_s": again["cpu_s"]}
    return {"parameters": parameters, **first, **later, "fingerprint_s": hashing, "caps_s": caps}


def svdvals(shape: tuple[int, int, int], vocabulary: int, sample: int) -> dict[str, Any]:
    """Processor seconds of float64 svdvals and of proven bounds, same blocks, extrapolated."""
    layers, d, heads = shape
    blocks = {
        "heads": (3 * heads, d // heads, d),
        "q": (1, d, d),
        "out": (1, d, d),
        "up": (1, 4 * d, d),
        "down": (1, d, 4 * d),
    }
    rows = min(_HEAD_ROWS, vocabulary)
    times, excess = {"exact": 0.0, "upper": 0.0}, 0.0
    generator = torch.Generator().manual_seed(0)
    kinds = [(blocks[k], layers / sample) for k in blocks for _ in range(sample)]
    for size, weight in [*kinds, ((1, rows, d), vocabulary / rows)]:
        w = torch.randn(size, generator=generator) * 0.02
        found = {}
        for name, method in (("exact", sigma_max_exact), ("upper", sigma_max_upper)):
            start = time.process_time()
            found[name] = method(w)
            times[name] += weight * (time.process_time() - start)
        excess = max(excess, float((found["upper"] / found["exact"] - 1).max()))
    stored = 0.0  # whole weights as GPT-2 stores them, [d_in, d_out]
    for size, weight in [
        *(((d, k * d), layers) for k in (3, 1, 4)),
        ((4 * d, d), layers),
        ((rows, d), vocabulary / rows),
    ]:
        w = (torch.randn(size, generator=generator) * 0.02).double()
        start = time.process_time()
        torch.linalg.svdvals(w)
        stored += weight * (time.process_time() - start)
    return {
        "stored_cpu_s": stored,
        "stored_ratio": stored / times["upper"],
        "svdvals_cpu_s": times["exact"],
        "bounds_cpu_s": times["upper"],
        "ratio": times["exact"] / times["upper"],
        "excess": excess,
        "layers_timed": sample,
    }


def run_case(arguments: list[str]) -> dict[str, Any]:
    """The result of one case, from a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", *arguments]
    return json.loads(output_of(command).splitlines()[-1])


def case(arguments: list[str]) -> dict[str, Any]:
    """What `run_case` asks the other process for."""
    kind = arguments[0]
    torch.set_num_threads(int(arguments[1]))
    if kind == "stream":
        folder = arguments[2]
        return measured(lambda: certify_streamed(folder))
    layers, d, heads, vocabulary = (int(a) for a in arguments[2:6])
    if kind == "memory":
        return in_memory((layers, d, heads), vocabulary)
    return svdvals((layers, d, heads), vocabulary, int(arguments[6]))


def show(table: Table, name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    keys = ("wall_s", "cpu_s", "before_mib", "peak_mib", "over_mib", "log10_lipschitz")
    table.row(name, f"{row['parameters'] / 1e6:.1f}M", *(row[key] for key in keys))


def options() -> argparse.Namespace:
    made = parser(__doc__, threads=1, svd_layers=(1, "layers whose singular values are timed"))
    made.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of streamed models"
    )
    made.add_argument("--folder", help="where the temporary files go; default: the system's place")
    made.add_argument("--case", nargs="+", help=argparse.SUPPRESS)
    return made.parse_args()


def main() -> None:
    args = options()
    if args.case:
        print(json.dumps(case(args.case)))
        return
    sizes, vocabulary = (SMOKE, 128) if args.smoke else (SIZES, 50257)
    streamed = {name: shape for name, shape in sizes.items() if args.smoke or name in args.sizes}
    first = next(iter(sizes))
    threads, plain = str(args.threads), [*(str(n) for n in sizes[first]), str(vocabulary)]
    torch.set_num_threads(args.threads)
    where = machine()
    headline("certificates at scale", where)
    table = Table(
        *(("case", "<20"), ("parameters", "10"), ("wall s", "8.1f"), ("cpu s", "8.1f")),
        *(("before MiB", "10.1f"), ("peak MiB", "10.1f"), ("over MiB", "10.1f")),
        ("log10", "8.2f"),
    )
    results: dict[str, Any] = {"memory": run_case(["memory", threads, *plain])}
    show(table, f"in memory {first}", results["memory"])
    for name, shape in streamed.items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            parameters = write_model(Path(folder), *shape, vocabulary)
            layer = 12 * shape[1] ** 2 * 2 / MIB
            found = run_case(["stream", threads, folder])
        row = results[f"stream {name}"] = {"parameters": parameters, "layer_mib": layer, **found}
        show(table, f"streamed {name}", row)
    svd = results["svdvals"] = run_case(["svdvals", threads, *plain, str(args.svd_layers)])
    print(
        f"float64 svdvals of all weights of {first} as stored {svd['stored_cpu_s']:.1f} s, of the "
        f"blocks that are bounded, tall, {svd['svdvals_cpu_s']:.1f} s (extrapolated); "
        f"proven bounds {svd['bounds_cpu_s']:.1f} s: {svd['stored_ratio']:.1f} and "
        f"{svd['ratio']:.1f} times faster, at most {svd['excess']:.1e} too high"
    )
    memory_row = results["memory"]
    print(
        f"{first} in memory: a later certificate {memory_row['again_cpu_s']:.2f} s, of which the "
        f"fingerprint {memory_row['fingerprint_s']:.2f} s; from caps {memory_row['caps_s']:.2f} s"
    )
    finish("certificate_scale", where, **results)


if __name__ == "__main__":
    main()
