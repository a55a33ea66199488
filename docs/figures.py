"""The tables of figures in docs/, from the benchmarks' JSON in docs/figures/.

    python docs/figures.py            # writes every table anew, between its marks in the pages
    python docs/figures.py --check    # exit code 1 where a page has another table

To renew a figure, run the benchmark that stands below its table with `--json docs/figures/NAME.json`, then this. Below
each table are the commit, the date and the machine that its file names. A file with ``transcribed`` holds what the page
said before such files were kept; the benchmark's JSON itself was not.
"""

import json
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
SHAPES = {"vit_s": "ViT-S", "vit_b": "ViT-B", "vit_l": "ViT-L", "tiny": "tiny"}


def layer(report):
    """Time and peak memory of our layer over the frozen FFN's."""
    ours = [row for row in report["rows"] if row["side"] == "ours" and row["tokens"] == _most(report)]
    cases = list(dict.fromkeys(row["experts"] for row in ours))
    found = {(row["shape"], row["experts"]): row for row in ours}
    shapes = list(dict.fromkeys(row["shape"] for row in ours))
    times = [[f"{SHAPES[s]}, time", *(f"{found[s, c]['step_ratio']:.2f}" for c in cases)] for s in shapes]
    peaks = [
        [f"{SHAPES[s]}, peak memory", *(f"{100 * found[s, c]['peak_share']:+.0f} %" for c in cases)] for s in shapes
    ]
    return ["ours over the frozen FFN", *cases], times + peaks


def layer_peers(report):
    """How many times our layer's time the same layer takes in other libraries, at the same number of tokens."""
    rows = [row for row in report["rows"] if row["side"] not in ("frozen FFN", "ours")]
    columns = list(dict.fromkeys((row["shape"], row["experts"]) for row in rows))
    sides = list(dict.fromkeys((row["side"], row["tokens"]) for row in rows))
    ours = {(r["shape"], r["experts"], r["tokens"]): r["step_ratio"] for r in report["rows"] if r["side"] == "ours"}
    times = {
        (row["side"], row["shape"], row["experts"]): row.get("times_ours")
        or row["step_ratio"] / ours[row["shape"], row["experts"], row["tokens"]]
        for row in rows
    }
    lines = []
    for side, tokens in sides:
        name = side if tokens == _most(report) else f"{side} ({tokens} tokens)"
        cells = [times.get((side, shape, experts)) for shape, experts in columns]
        lines.append([name, *("" if cell is None else f"{cell:.1f}" for cell in cells)])
    return ["how many times our time", *(f"{SHAPES[s]} {e.split('/')[0]}" for s, e in columns)], lines


def train_step(report):
    """The whole step: milliseconds, and the time over ours."""
    shapes = list(dict.fromkeys(row["shape"] for row in report["rows"]))
    rows = {(row["side"], row["shape"]): row for row in report["rows"]}
    ours = {shape: rows["ase_16_3_1_4", shape]["ratio_to_lora"] for shape in shapes}
    names = {"ase_16_3_1_4": "experts, all tasks in one pass", "mtl_vit_lora": "plain LoRA in place of experts",
             "mtl_vit_lora, torch": "plain LoRA, torch", "ase_16_3_1_4, torch": "experts, torch"}  # fmt: skip
    lines = []
    for side in dict.fromkeys(row["side"] for row in report["rows"]):
        cells = [[f"{rows[side, s]['step_ms']:.0f}", f"{rows[side, s]['ratio_to_lora'] / ours[s]:.2f}"] for s in shapes]
        lines.append([names.get(side, side), *(cell for pair in cells for cell in pair)])
    return ["step", *(cell for s in shapes for cell in (f"{SHAPES[s]} ms", "over ours"))], lines


def scaling(report):
    """Slopes of lines through logarithms."""
    return ["along", "slope"], [[axis, f"{slope:.2f}"] for axis, slope in report["slopes"].items()]


def data(report):
    """A sample read, decoded and augmented."""
    rows = report["milliseconds_per_image"]
    slowest = rows[0]["total"]
    lines = [[row["name"], f"{row['total']:.2f}", f"{slowest / row['total']:.1f}"] for row in rows]
    return ["read from", "ms", "times faster"], lines


def expert_parallel(report):
    """One layer on two ranks, against plain data parallelism."""
    shapes = list(dict.fromkeys(row["shape"] for row in report["rows"]))
    rows = {(row["side"], row["shape"]): row for row in report["rows"]}
    names = {"data parallel": "plain data parallelism", "DeepSpeed MoE": "DeepSpeed's MoE, k = 3, no drops"}
    lines = []
    for side in dict.fromkeys(row["side"] for row in report["rows"]):
        taken = f" (takes `{rows[side, shapes[0]]['dispatch']}`)" if side == "auto" else ""
        name = names.get(side, f"`{side}`{taken}")
        cells = [[f"{rows[side, s]['step_ms']:.0f}", f"{rows[side, s]['step_ratio']:.2f}"] for s in shapes]
        sent = f"{rows[side, shapes[-1]]['bytes_sent'] / 1e6:.2f}"
        lines.append([name, *(cell for pair in cells for cell in pair), sent])
    titles = [cell for s in shapes for cell in (f"{SHAPES[s]} ms", "ratio")]
    return ["side", *titles, f"{SHAPES[shapes[-1]]} MB sent"], lines


SIDES = ("frozen FFN", "plain LoRA", "loop over experts", "sorted products", "ours")


def counted_layer(report):
    """Least time over the frozen FFN's, and kernels."""
    rows = {(row["shape"], row["experts"], row["side"]): row for row in report["rows"] if row["what"] == "layer"}
    lines = []
    for shape, experts in dict.fromkeys(key[:2] for key in rows):
        ratios = [f"{rows[shape, experts, side]['time_ratio']:.2f}" for side in SIDES[1:]]
        kernels = ", ".join(f"{rows[shape, experts, side]['kernels']:,}" for side in SIDES)
        lines.append([f"{SHAPES[shape]} {experts}", *ratios, kernels])
    return ["ViT, N/k/S/r", *SIDES[1:], "kernels: FFN, LoRA, loop, sorted, ours"], lines


def counted_step(report):
    """The five-task step by side."""
    rows = [row for row in report["rows"] if row["what"] == "step"]
    lines = [[row["side"], f"{row['time_ratio']:.2f}", f"{row['kernels']:,}", f"{row['kernel_ratio']:.2f}",
              f"{row['bytes'] / 1e9:.1f}", f"{row['flops'] / 1e9:,.0f}", f"{1e3 * row['seconds']:.1f}"]
             for row in rows]  # fmt: skip
    columns = ["side", "time over plain LoRA", "kernels", "kernels over plain LoRA", "GB", "GFLOP", "least ms"]
    return columns, lines


def counted_modules(report):
    """The five-task step by module."""
    ours, lora = ({row["side"]: row for row in report["rows"] if row["what"] == "step"}[s]["modules"]
                  for s in ("ours", "plain LoRA"))  # fmt: skip
    lines = []
    for name in sorted(ours, key=lambda name: -ours[name]["seconds"]):
        cells = [(f"{m[name]['kernels']}", f"{1e3 * m[name]['seconds']:.2f}") if name in m else ("", "")
                 for m in (ours, lora)]  # fmt: skip
        lines.append([f"`{name}`", *cells[0], *cells[1]])
    return ["module", *(f"{s}: {what}" for s in ("ours", "plain LoRA") for what in ("kernels", "least ms"))], lines


def fused(report):
    """Kernels before and after the compiler."""
    rows = {}
    for row in report["rows"]:
        rows.setdefault((row["shape"], row["side"], row["eager"], row["fused"]), []).append(row["experts"])
    lines = [[f"{SHAPES[shape]} {', '.join(experts)}", side, str(eager), str(compiled)]
             for (shape, side, eager, compiled), experts in rows.items()]  # fmt: skip
    return ["ViT, N/k/S/r", "side", "kernels, eager", "kernels, compiled"], lines


def measured_layer(report):
    """A layer on a GPU, in milliseconds."""
    sides = (*SIDES, "ours, compiled")
    rows = {(row["shape"], row["experts"], row["dtype"], row["side"]): row["ms"] for row in report["layer"]}
    lines = []
    for shape, experts, dtype in dict.fromkeys(key[:3] for key in rows):
        times = [rows.get((shape, experts, dtype, side)) for side in sides]
        lines.append([f"{SHAPES[shape]} {experts}", dtype, *("" if ms is None else f"{ms:.2f}" for ms in times)])
    return ["ViT, N/k/S/r", "type", *sides], lines


def measured_step(report):
    """The five-task step on a GPU: milliseconds, over plain LoRA of the same turns, and what it holds."""
    lines = [[row["side"], row["dtype"], f"{row['ms']:.1f}", f"{row['ratio']:.2f}", f"{row['peak_mb'] / 1e3:.1f}",
              f"{row['counted_ms']:.1f}" if "counted_ms" in row else ""] for row in report["step"]]  # fmt: skip
    return ["side", "type", "ms", "time over plain LoRA", "peak GB", "counted: least ms"], lines


def host(report):
    """The host's time for a layer."""
    lines = [[row["side"], f"{row['microseconds']:,.0f}", str(row["operators"])] for row in report["rows"]]
    return ["side", "microseconds", "operators dispatched"], lines


def balancing(report):
    """The step with each method over that with fixed weights."""
    lines = [[f"`{row['method']}`", f"{row['ratio']:.2f}", f"{row['processor_ratio']:.2f}"] for row in report["rows"]]
    return ["method", "step over that with fixed weights", "by the processor's clock"], lines


# the mark in a page: what makes the table, and the file
TABLES = {
    "layer": (layer, "layer.json"),
    "layer_peers": (layer_peers, "layer.json"),
    "train_step": (train_step, "train_step.json"),
    "scaling": (scaling, "scaling.json"),
    "data": (data, "data.json"),
    "data_ccp": (data, "data_ccp.json"),
    "expert_parallel": (expert_parallel, "expert_parallel.json"),
    "counted_layer": (counted_layer, "roofline.json"),
    "counted_step": (counted_step, "roofline.json"),
    "counted_modules": (counted_modules, "roofline.json"),
    "fused": (fused, "fused.json"),
    "measured_layer": (measured_layer, "on_gpu.json"),
    "measured_step": (measured_step, "on_gpu.json"),
    "host": (host, "host.json"),
    "balancing": (balancing, "balancing.json"),
}
MARK = re.compile(r"^(<!-- figures: (\w+) -->\n).*?^(<!-- end of figures -->)$", re.MULTILINE | re.DOTALL)


def _most(report):
    return max(row["tokens"] for row in report["rows"])


def table(name):
    """A table of ``TABLES`` as Markdown, and below it where its figures are from."""
    make, file = TABLES[name]
    report = json.loads((DOCS / "figures" / file).read_text(encoding="utf-8"))
    columns, rows = make(report)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    machine = report["machine"]
    where = "counted" if report.get("counted") else f"{machine['cores']} cores {machine['processor']}"
    where += f", {report['device']}" if "device" in report else ""
    commit = (report["commit"] or "unknown")[:7]
    source = f"`docs/figures/{file}`: `benchmarks/{report['benchmark']}`, commit {commit}, {report['date']}, {where}"
    source += f", torch {machine['torch']}" if machine["torch"] else ""
    note = "; transcribed from the page of that commit" if report.get("transcribed") else ""
    return "\n".join([*lines, "", f"{source}{note}.", ""])


def renewed(text):
    """A page with every table made anew; KeyError for a mark that ``TABLES`` does not have."""
    return MARK.sub(lambda match: f"{match[1]}\n{table(match[2])}\n{match[3]}", text)


def main():
    """Write, or compare; 1 where a page differs and was only to be compared."""
    stale = []
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            stale.append(page.name)
            if "--check" not in sys.argv:
                page.write_text(renewed(text), encoding="utf-8")
    sys.stdout.write(f"other tables: {', '.join(stale) or 'none'}\n")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
