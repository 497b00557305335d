"""Puts measured results between README.md's markers, so that no number there is written by hand.

    python benchmarks/readme.py            # rewrite README.md
    python benchmarks/readme.py --check    # exit with 1 if README.md is not what the results say

Sources: benchmarks/results/demo.txt (printed by examples/demo.py), cpu.json and h200.json. A part on
speed is empty until h200.json holds its suite ('attention', 'select', 'skip', 'mmha', 'ttft', 'calib'); draw the images
first: python benchmarks/plot_attention.py, plot_selection.py. The parts on policies and on targets are what
examples/compare_policies.py and examples/target_table.py wrote.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from typing import Any

from report import ROOT

RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def _load(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    report = json.loads((RESULTS / name).read_text())
    return report, {m["id"]: m for m in report["measurements"]}


def demo() -> str:
    """The demo's own output."""
    return "```text\n" + (RESULTS / "demo.txt").read_text().rstrip() + "\n```"


def benchmarks() -> str:
    """One paragraph per machine."""
    cpu, c = _load("cpu.json")
    h200, g = _load("h200.json")
    # Tests are run on every change, the rest less often.
    tests = _load("h200_tests.json" if (RESULTS / "h200_tests.json").is_file() else "h200.json")[0]
    machine = cpu["machine"]
    rows = [
        f"Measured on a CPU ({machine['cpu']}, {machine['threads']} threads, {machine['instruction_set']}, torch "
        f"{machine['torch']}; 8 query and 2 KV heads, head_dim 64, causal, 16K tokens; `make bench-cpu`):",
        "",
        "| | torch SDPA | bsfa dense | | bsfa, 10 % of the blocks | |",
        "|---|---|---|---|---|---|",
    ]
    for dtype, name in (("f32", "float32"), ("bf16", "bfloat16")):
        dense, sparse = c[f"cpu.dense.16k.{dtype}.ms"], c[f"cpu.sparse10.16k.{dtype}.ms"]
        over = c[f"cpu.dense.16k.{dtype}.time_over_sdpa"]["value"]
        faster = c[f"cpu.sparse10.16k.{dtype}.x_sdpa"]["value"]
        rows.append(
            f"| {name} | {dense['peers']['sdpa_ms']:.0f} ms | {dense['value']:.0f} ms | {over:.2f}x the time | "
            f"{sparse['value']:.0f} ms | {faster:.1f}x faster |"
        )
    pool, paged = g["pool.64k.copy_fraction"], g["pool.paged16.64k.copy_fraction"]
    rows += [
        "",
        f"On one {h200['device']['name']} (torch {h200['device']['torch']}; `make gpu-check`), `pool_blocks` over 64K "
        f"tokens, 8 KV heads, head_dim 128, bfloat16 takes {g['pool.64k.us']['value']:.1f} us: {pool['value']:.0%} of "
        f"the bandwidth of a device copy, and {paged['value']:.0%} with pages of 16 tokens. There "
        f"{tests['tests']['passed']} GPU tests passed, {tests['tests']['failed']} failed, and compute-sanitizer found "
        f"{sum(v or 0 for v in h200['sanitizer'].values())} errors.",
    ]
    older = [folder for folder, tree in tests["tree"].items() if h200["tree"][folder] != tree]
    if older:
        which = " and ".join(f"`{f}` {h200['tree'][f][:7]} (the tests: {tests['tree'][f][:7]})" for f in older)
        same = "".join(f", with the same `{folder}`" for folder in tests["tree"] if folder not in older)
        rows += ["", f"All but these tests ran on sources a little older: {which}{same}."]
    return "\n".join(rows)


def attention() -> str:
    """Attention on the GPU, as a section; empty if the report has no such measurements."""
    report, rows = _load("h200.json")
    found = {
        id_: row for id_, row in rows.items() if id_.startswith("attn.") and not id_.startswith("attn.correction.")
    }
    if not found:
        return ""
    value = {id_.removeprefix("attn."): row["value"] for id_, row in found.items()}
    clocks = [row["clock_mhz"] for row in found.values() if row["clock_mhz"]]
    lines = [
        f"## Attention on one {report['device']['name']}",
        "",
        "bfloat16, batch 1, 32 query and 8 KV heads, head_dim 128, causal, random data; calls that are compared took "
        f"turns in one process (torch {report['device']['torch']}, SM clock {min(clocks)} to {max(clocks)} MHz). "
        "Definitions: [benchmarks/README.md](benchmarks/README.md).",
        "",
        "![TFLOP/s of dense attention against sequence length, and efficiency against density]"
        "(docs/images/attention_h200.png)",
        "",
        "| dense | bsfa | | against cuDNN | against FlashAttention-2 |",
        "|---|---|---|---|---|",
    ]
    for size in ("4k", "16k", "64k", "128k"):
        name = f"dense.d128.{size}"
        lines.append(
            f"| {size.upper()} tokens | {value[f'{name}.ms']:.3g} ms | {value[f'{name}.tflops']:.0f} TFLOP/s | "
            f"{value[f'{name}.x_cudnn']:.2f}x as fast | {value[f'{name}.x_fa2']:.2f}x as fast |"
        )
    lines += [
        "",
        "Random 128 x 128 blocks kept per query head; efficiency is density x dense time / sparse time:",
        "",
        "| block-sparse | bsfa | against bsfa dense | efficiency | in cycles | compiled flex_attention |",
        "|---|---|---|---|---|---|",
    ]
    for percent, size in ((10, "16k"), (10, "64k"), (10, "128k"), (5, "128k"), (5, "256k")):
        row = rows[f"attn.sparse{percent}.{size}.efficiency"]
        taken, peers = value[f"sparse{percent}.{size}.ms"], row["peers"]
        flex = f"{peers['flex_ms']:.3g} ms" if "flex_ms" in peers else ""
        in_cycles = f"{peers['in_cycles']:.0%}" if "in_cycles" in peers else ""
        lines.append(
            f"| {percent} %, {size.upper()} tokens | {taken:.3g} ms | {peers['dense_ms'] / taken:.1f}x as fast | "
            f"{row['value']:.0%} | {in_cycles} | {flex} |"
        )
    pages = [
        f"{value[f'paged{page_size}.sparse10.{size}.ms']:.3g}" for size in ("16k", "128k") for page_size in (16, 128)
    ]
    lines += [
        "",
        "The card is power-limited: dense and sparse calls, which took turns, did not run at the same clock. In cycles "
        "of that clock efficiencies are as the column beside says.",
        "",
        f"With keys and values in pages of 16 and 128 tokens, in random order, 10 % takes {pages[0]} and {pages[1]} ms "
        f"at 16K, {pages[2]} and {pages[3]} ms at 128K.",
        "",
        "| 64K tokens, pages in random order: time over contiguous | page 16 | page 64 | page 128 |",
        "|---|---|---|---|",
    ]
    launch = rows["attn.launch.1k.us"]["peers"]
    for kind, name in (("dense", "dense"), ("sparse10", "10 % of the blocks")):
        ratios = [f"{value[f'paged{page_size}.{kind}.x_contiguous']:.3f}" for page_size in (16, 64, 128)]
        lines.append(f"| {name} | {' | '.join(ratios)} |")
    lines += [
        "",
        "Against the same work spread evenly over the heads, a mask with half of them at 2 % and half at 40 % takes "
        f"{value['skew.half.x_uniform']:.3f} times as long, one with one head at 100 % and the others at 3 % "
        f"{value['skew.one.x_uniform']:.3f}. At head_dim 64, dense attention over 16K tokens runs at "
        f"{value['dense.d64.16k.tflops']:.0f} TFLOP/s, {value['dense.d64.16k.x_cudnn']:.2f}x as fast as cuDNN.",
        "",
        f"An eager dense call of 1K tokens takes {value['launch.1k.us']:.0f} us beyond its kernels on that host, where "
        f"torch's SDPA takes {launch['fa2_us']:.0f} (FlashAttention-2) and {launch['cudnn_us']:.0f} us (cuDNN); "
        f"replayed from a CUDA graph {launch['graph_us'] - launch['kernel_us']:.0f} us.",
    ]
    return "\n".join(lines)


def selection() -> str:
    """Block selection on the GPU, as a section; empty if the report has no such measurements."""
    report, rows = _load("h200.json")
    found = {id_: row for id_, row in rows.items() if id_.startswith(("select.", "e2e.", "attn.correction."))}
    if not found:
        return ""
    value = {id_: row["value"] for id_, row in found.items()}
    clocks = [row["clock_mhz"] for row in found.values() if row["clock_mhz"]]
    lines = [
        f"## Selection on one {report['device']['name']}",
        "",
        "`RelativeMax` from cold keys (pooling included) and the attention over what it keeps, the same shapes as "
        "above and fresh random data; alpha is chosen so that the density is about 5 % (at 4K about 73 %, as published "
        "for models at that length, and the fewest blocks that the policy can keep, as at 16K); SM clock "
        f"{min(clocks, default=0)} to {max(clocks, default=0)} MHz. Definitions: "
        "[benchmarks/README.md](benchmarks/README.md).",
        "",
        "![Selection time as a share of dense attention, and end-to-end speed-up, against length]"
        "(docs/images/select_h200.png)",
        "",
        "| tokens | blocks kept | pool + select | of bsfa dense | pool + select + attend | against FlashAttention-2 | "
        "against cuDNN | against bsfa dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in ("4k", "4k_least", "16k", "64k", "128k", "256k", "256k_shared"):
        name = f"relmax.{size}"
        label = size.removesuffix("_least").replace("k_shared", "k, a mask per KV head").replace("k", "K", 1)
        row = found[f"select.{name}.ms"]
        speed = " | ".join(f"{value[f'e2e.{name}.x_{peer}']:.1f}x" for peer in ("fa2", "cudnn", "dense"))
        lines.append(
            f"| {label} | {row['peers']['density']:.1%} | {row['value']:.3g} ms | "
            f"{row['value'] / row['peers']['dense_ms']:.1%} | {value[f'e2e.{name}.ms']:.3g} ms | {speed} |"
        )
    lines += [
        "",
        "| selection at 128K | time |",
        "|---|---|",
        *(
            f"| {label} | {value[f'select.{name}.128k.ms']:.3g} ms |"
            for name, label in (
                ("relmax.paged", "`RelativeMax`, pages of 16 tokens in random order"),
                ("cached_chunk", "`RelativeMax`, the last 8K tokens, means cached beside the pages"),
                ("flexprefill", "`FlexPrefill`"),
                ("antidiagonal", "`Antidiagonal`, stride 16"),
                ("mass95", "`CumulativeMass` 0.95"),
                ("flat64_95", "`CumulativeMass` 0.95, flat64"),
            )
        ),
        "",
        f"At 1M tokens a selection takes {value['select.relmax.1m.ms']:.0f} ms and "
        f"{value['select.workspace.1m.mb']:.0f} MB, mask and summary included. Counting dropped blocks by their means "
        f"costs {value['attn.correction.64k.x_plain'] - 1:.0%} of the attention at 64K and 10 % of the blocks.",
    ]
    return "\n".join(lines)


#: Rows of policies_tiny_lm.csv that the README shows: policy, beginning of its parameters. Those of BUDGET follow.
SHOWN = (
    ("dense", ""),
    ("static", "sink 2 window 16"),
    ("relative-max", "alpha 0.12"),
    ("relative-max shared", "alpha 0.12"),
    ("relative-max, mean correction", "alpha 0.12"),
    ("relative-max calibrated", "target 0.95"),
    ("relative-max, density matched", "as target 0.95"),
    ("cumulative-mass mean", "mass 0.95"),
    ("cumulative-mass flat64", "mass 0.95"),
    ("flex-prefill", "gamma 0.95 tau 0.1 min_budget 1024"),
    ("antidiagonal", "stride 16 mass 0.9"),
    ("oracle", "mass 0.95"),
)
BUDGET = "antidiagonal, budget"


def skip() -> str:
    """Skipping by exact logits, as a section; empty if the report has no such measurements."""
    report, rows = _load("h200.json")
    found = {id_: row for id_, row in rows.items() if id_.startswith("skip.")}
    if not found:
        return ""
    names = {
        "0": "absolute, nothing skipped",
        "50": "absolute",
        "70": "absolute",
        "90": "absolute",
        "relative.70": "relative",
        "counted.70": "absolute, counted in the LSE",
        "apart.70": "absolute, both groups of a tile on their own",
    }
    ways = {"one_pass": "one pass", "two_pass": "two passes", "bounds": "bounds, one pass"}
    lines = [
        f"## Exact skip on one {report['device']['name']}",
        "",
        "`ExactSkip` at 64K tokens, the same shapes as above: times, and against our own dense attention over the same "
        "data, in which the blocks that can be skipped are planted. In brackets what is skipped where that is less. "
        "Definitions: [benchmarks/README.md](benchmarks/README.md).",
        "",
        f"| decision | skipped | {' | '.join(ways.values())} |",
        "|---|---|---|---|---|",
    ]
    for name, text in names.items():
        cells, share = [], 0.0
        for way in ways:
            id_ = f"{way}.{name}"
            if way == "one_pass" and f"skip.{id_}.ms" not in found:
                id_ = name  # the only form
            if f"skip.{id_}.ms" not in found:
                cells.append("")
                continue
            row = found[f"skip.{id_}.x_dense"]
            skipped = row["peers"]["skipped"]
            share = max(share, skipped)
            less = f" ({skipped:.0%})" if skipped < share - 0.005 else ""
            cells.append(f"{found[f'skip.{id_}.ms']['value']:.3g} ms, {row['value']:.2f}x{less}")
        if any(cells):
            lines.append(f"| {text} | {share:.0%} | {' | '.join(cells)} |")
    on_mask = found.get("skip.sparse10.x_sparse")
    if on_mask is not None:
        p = on_mask["peers"]
        lines += [
            "",
            f"On a random mask of {p['density']:.0%} of the blocks, of which {p['skipped']:.0%} are skipped, it is "
            f"{on_mask['value']:.2f}x as fast as on that mask alone.",
        ]
    return "\n".join(lines)


def masked() -> str:
    """Multi-head attention under token sets, as a section; empty if the report has no such measurements."""
    report, rows = _load("h200.json")
    if "mmha.8k.x_dense" not in rows:
        return ""
    lines = [
        f"## Token sets and MLA's head_dims on one {report['device']['name']}",
        "",
        "head_dim 192 of queries and keys and 128 of values (un-absorbed MLA), bfloat16, batch 1, causal, random data. "
        "Masked: 2048 keys for each query, drawn at random (then no block of 128 x 128 is empty), or near it and in a "
        "few clusters. Definitions: [benchmarks/README.md](benchmarks/README.md).",
        "",
        "| tokens | heads | dense | | against cuDNN |",
        "|---|---|---|---|---|",
    ]
    for kilo in (8, 32):
        for heads in (16, 128):
            name = f"mla.dense.{kilo}k.h{heads}"
            lines.append(
                f"| {kilo}K | {heads} | {rows[f'{name}.ms']['value']:.3g} ms | "
                f"{rows[f'{name}.tflops']['value']:.0f} TFLOP/s | {rows[f'{name}.x_cudnn']['value']:.2f}x as fast |"
            )
    lines += [
        "",
        "| tokens | heads | dense | random sets | local sets | blocks that hold a key of these |",
        "|---|---|---|---|---|---|",
    ]
    for kilo in (4, 8, 16):
        for heads, part in ((16, ".h16"), (128, "")):
            random, local = rows[f"mmha.{kilo}k{part}.x_dense"], rows[f"mmha.{kilo}k{part}.local.x_dense"]
            lines.append(
                f"| {kilo}K | {heads} | {random['peers']['dense_ms']:.3g} ms | {random['value']:.2f} of that time | "
                f"{local['value']:.2f} | {local['peers']['density']:.0%} |"
            )
    build = rows["mmha.build.16k.ms"]["value"]
    lines += [
        "",
        f"torch's SDPA with the same sets as a boolean mask takes {rows['mmha.8k.x_sdpa_mask']['value']:.1f} times as "
        f"long (8K, 128 heads). Words and block mask of 16K queries are made in {build:.2g} ms.",
        "",
        "Gathering the 2048 keys of each query from the latent cache (absorbed MLA: 576 and 512 dims, in torch, "
        "without a fused kernel), in times of masking, its mask's making included:",
        "",
        "| tokens | 16 heads | 32 heads | 64 heads | 128 heads |",
        "|---|---|---|---|---|",
    ]
    for kilo in (4, 8, 16, 32):
        times = [rows[f"mmha.cross.{kilo}k.h{heads}.x_gather"]["value"] for heads in (16, 32, 64, 128)]
        lines.append(f"| {kilo}K | " + " | ".join(f"{t:.1f}" for t in times) + " |")
    return "\n".join(lines)


def ttft() -> str:
    """Time to the first token in transformers, as a section; empty if the report has no such measurements."""
    report, rows = _load("h200.json")
    found = [kilo for kilo in (16, 64, 128) if f"ttft.8b.{kilo}k.dense.x_sdpa" in rows]
    if not found:
        return ""
    lines = [
        f"## Time to the first token in transformers on one {report['device']['name']}",
        "",
        "A model of Llama 3.1 8B's shape with random weights, bfloat16, one prompt; per-layer, per-head thresholds of "
        "`RelativeMax` that keep the share of the blocks that the table says (random weights have no mass worth "
        "keeping: only the cost is meant). In brackets the share of the time that is attention, selection included. "
        "Definitions: [benchmarks/README.md](benchmarks/README.md).",
        "",
        "| tokens | sdpa | bsfa dense | bsfa, thresholds | blocks kept | against sdpa |",
        "|---|---|---|---|---|---|",
    ]
    for kilo in found:
        dense, sparse = rows[f"ttft.8b.{kilo}k.dense.x_sdpa"], rows[f"ttft.8b.{kilo}k.calibrated.x_sdpa"]
        d, s = dense["peers"], sparse["peers"]
        lines.append(
            f"| {kilo}K | {d['sdpa_ttft_ms'] / 1e3:.2f} s ({d['sdpa_attention_share']:.0%}) | "
            f"{d['ttft_ms'] / 1e3:.2f} s ({d['attention_share']:.0%}) | "
            f"{s['ttft_ms'] / 1e3:.2f} s ({s['attention_share']:.0%}) | {s['density']:.1%} | "
            f"{dense['value']:.2f}x and {sparse['value']:.2f}x as fast |"
        )
    least = rows.get("crossover.relmax.tokens")
    if least is not None:
        lines += [
            "",
            f"From {least['value']:.0f} tokens on, selecting and attending to 15 % of the blocks is faster than dense "
            "attention, as eager calls too: that is where policies act unless they are told otherwise (`min_seqlen`).",
        ]
    return "\n".join(lines)


def calibrating() -> str:
    """How long calibration takes, as a paragraph; empty if the report has no such measurements."""
    report, rows = _load("h200.json")
    if "calib.tiny.16k.s" not in rows:
        return ""
    tiny, large, memory = (rows[f"calib.{name}"]["value"] for name in ("tiny.16k.s", "8b.64k.s", "8b.64k.gb"))
    return (
        f"On one {report['device']['name']}, calibrating the shipped model on 64 prompts of 16K tokens takes "
        f"{tiny:.1f} s; a model of Llama 3.1 8B's shape on 2 prompts of 64K takes {large:.0f} s and {memory:.0f} GB."
    )


def policies() -> str:
    """Quality of the policies on the shipped model, as a section; empty if examples/compare_policies.py has not run."""
    if not (RESULTS / "policies_tiny_lm.csv").is_file():
        return ""
    with open(RESULTS / "policies_tiny_lm.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    facts = json.loads((RESULTS / "policies_tiny_lm.json").read_text())
    settings = facts["settings"]
    lengths = list(settings["prompts_by_length"])
    lines = [
        "## What each policy keeps and loses",
        "",
        f"On the shipped model's own queries and keys, {sum(settings['prompts_by_length'].values())} prompts "
        f"({settings['machine']}, {settings['dtype']}; `examples/compare_policies.py`, all rows in "
        "`benchmarks/results/policies_tiny_lm.csv`). The oracle keeps the fewest blocks with that share of the true "
        "mass; *density matched* is one alpha for all heads with the calibrated table's density.",
        "",
        "![Mass lost, text loss and needles against density, by policy](docs/images/policies_tiny_lm.png)",
        "",
        f"| policy | | {' | '.join(f'blocks kept, {n}' for n in lengths)} | mass kept | text loss | "
        f"{' | '.join(f'needles, {n}' for n in lengths)} |",
        "|---|---|" + "---|" * (2 + 2 * len(lengths)),
    ]
    shown = [next(r for r in rows if r["policy"] == p and r["parameters"].startswith(start)) for p, start in SHOWN]
    for row in shown + [r for r in rows if r["policy"] == BUDGET]:
        kept = " | ".join(f"{float(row[f'density_{n}']):.1%}" for n in lengths)
        right = " | ".join(f"{row[f'needles_right_{n}']}/{row[f'needles_asked_{n}']}" for n in lengths)
        lines.append(
            f"| {row['policy']} | {row['parameters']} | {kept} | {float(row['recall']):.2%} | "
            f"{float(row['loss_change']):+.2%} | {right} |"
        )
    better = [f"{row['target']:.2f}" for row in facts["equal_density"] if row["dominates"]]
    all_targets = ", ".join(f"{row['target']:.2f}" for row in facts["equal_density"])
    lines += [
        "",
        "Calibrated per layer and head, `RelativeMax` is no worse than with one alpha of equal density in mass kept, "
        f"text loss and needles, and better in one of them, at targets {', '.join(better) or 'none'} "
        f"(of {all_targets}).",
    ]
    budgets = facts.get("budgets", [])
    if budgets:
        wins: dict[str, list[bool]] = {}
        for row in budgets:
            wins.setdefault(row["budget"], []).append(row["better_on_both"])
        counts = ", ".join(f"{sum(won)} of {len(won)} ({budget})" for budget, won in wins.items())
        lines += [
            "",
            f"`{BUDGET}` spends blocks where they lower an error most (`--target-density`). At {lengths[-1]} it has "
            "more needles and less text loss than so many of the published rules, each at the density that it keeps: "
            f"{counts}.",
        ]
    return "\n".join(lines)


def targets() -> str:
    """What target recalls give on the shipped model, as a section; empty if examples/target_table.py has not run."""
    if not (RESULTS / "targets_tiny_lm.csv").is_file():
        return ""
    with open(RESULTS / "targets_tiny_lm.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    s = json.loads((RESULTS / "targets_tiny_lm.json").read_text())["settings"]
    dense = s["dense"]
    lines = [
        "## What a target recall gives",
        "",
        f"Thresholds per layer and head from {s['calibration_prompts']} prompts of {s['length']} tokens, of which half "
        "choose and half check (of `exact-skip`, an eighth chooses slopes). On the half that checks: the share of "
        "attention mass kept, in the mean and in a prompt's worst tenth of query tiles, which is what the target "
        "promises, each with the share of (layer, head) pairs whose mean meets the target. On "
        f"{s['prompts']} other prompts: blocks kept, text loss, needle questions (dense: {dense['needles_right']} of "
        f"{dense['needles_asked']}), and selection + attention of all layers against bsfa dense "
        f"({dense['attention_ms']:.3g} ms). The model is small ({s['layers']} layers, {s['heads'][0]} query and "
        f"{s['heads'][1]} KV heads, head_dim {s['head_dim']}), so selecting takes a larger share than in a large one "
        f"({s['machine']}, {s['dtype']}; `examples/target_table.py`, more columns in "
        "`benchmarks/results/targets_tiny_lm.csv`).",
        "",
        "| policy | target | mass kept | pairs on target | in worst tiles | pairs on target | blocks kept | text loss "
        "| needles | attention |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        n = {name: float(value) for name, value in r.items() if name != "policy" and value}
        lines.append(
            f"| {r['policy']} | {n['target']:.2f} | {n['held_out_recall']:.2%} | {n['held_out_pairs_on_target']:.0%} | "
            f"{n['held_out_tail_recall']:.2%} | {n['held_out_tail_pairs_on_target']:.0%} | {n['density']:.1%} | "
            f"{n['loss_change']:+.2%} | {r['needles_right']}/{r['needles_asked']} | "
            f"{n['attention_speedup']:.2f}x as fast |"
        )
    met = [float(r["held_out_recall"]) >= float(r["target"]) for r in rows]
    least = min(float(r["held_out_pairs_on_target"]) for r in rows)
    lines += [
        "",
        f"The mass kept is at least the target in the mean in {sum(met)} of {len(met)} rows, and in at least "
        f"{least:.0%} of the pairs in each.",
    ]
    return "\n".join(lines)


def filled(text: str) -> str:
    """README.md with all marked places replaced."""
    for name, section in (
        ("demo", demo),
        ("benchmarks", benchmarks),
        ("attention", attention),
        ("selection", selection),
        ("skip", skip),
        ("masked", masked),
        ("ttft", ttft),
        ("calibrating", calibrating),
        ("policies", policies),
        ("targets", targets),
    ):
        content = section()
        content += "\n" if content else ""
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, c=content: f"{m[1]}{c}{m[2]}", text)
        if count != 1:
            raise ValueError(f"README.md must have exactly one place marked '{name}', it has {count}")
    return text


def main() -> None:
    """Rewrite or check README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text()
    wanted = filled(text)
    if check and text != wanted:
        sys.exit("README.md does not say what benchmarks/results/ says: run python benchmarks/readme.py")
    README.write_text(wanted)


if __name__ == "__main__":
    main()
