"""How much ExactSkip's bounds (docs/kernels/bound_mask.md) are sure of on a real model; on the CPU, no kernels of bsfa.

Queries and keys of every layer of the embedded model on one prompt, in bfloat16, are rounded as the kernels do it, and
in two other ways. Printed per layer: the median error of a logit in nats that the bound allows for, and of the pairs
(group of 64 rows, KV block; neither sink nor diagonal) the share whose exact logits all lie a cut of some nats below
the largest one that the row has in its diagonal block and the sink, beside the share for which the bounds are sure.
Then, for a cut of each head that lets the bounds leave out some share of the (tile of 128 rows, KV block) pairs: of
those that stay the share which a quarter shows already, the tile's upper or lower 64 rows against the first 64 keys.

``PYTHONPATH=python python benchmarks/bound_tightness.py [--tokens 4096] [--output FILE]``
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calibrating import TINY_LM, prompts_of_length

BLOCK, GROUP = 128, 64
CUTS = (2.0, 4.0, 6.0)  # nats
LEFT_OUT = (0.1, 0.5, 0.7, 0.9)

Round = Callable[[Tensor, Tensor], Tensor]


def integers(x: Tensor, largest: Tensor) -> Tensor:
    """8-bit integers times largest / 127: what the kernels do."""
    factor = largest.clamp(min=1e-30) / 127
    return (x / factor).round() * factor


def e4m3(x: Tensor, largest: Tensor) -> Tensor:
    """float8 with a power of two that brings ``largest`` to 8 .. 16."""
    power = torch.exp2(3 - torch.floor(torch.log2(largest.clamp(min=1e-30))))
    return (x * power).to(torch.float8_e4m3fn).float() / power


def queries_and_keys(tokens: int) -> list[tuple[Tensor, Tensor, float]]:
    """Of each layer: float32 [heads, tokens, dim] with the values of bfloat16, and the scale."""
    found: list[tuple[Tensor, Tensor, float]] = []

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        found.append((q[0].bfloat16().float(), k[0].bfloat16().float(), scaling))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scaling)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["bound-tightness"] = attention
    tokenizer = AutoTokenizer.from_pretrained(TINY_LM / "model")
    model = AutoModelForCausalLM.from_pretrained(TINY_LM / "model", dtype=torch.float32)
    model.set_attn_implementation("bound-tightness")
    prompt = prompts_of_length("calibration", tokenizer, tokens, 2)[0]
    ids = torch.tensor(tokenizer(prompt.text)["input_ids"])[None, :tokens]
    with torch.no_grad():
        model(ids)
    return found


def rounded_by(rounded: Round, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What q [heads, rows, dim] and keys [KV heads, blocks, BLOCK, dim] become, the latter for each query head, and how
    far a product of theirs can be from the exact one: [heads, rows, blocks].
    """

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(len(q) // len(keys), 0)

    held = rounded(keys, keys.abs().amax((-1, -2), keepdim=True))
    lost = (keys - held).norm(dim=-1).amax(-1)
    norm = torch.maximum(keys.norm(dim=-1), held.norm(dim=-1)).amax(-1)
    queries = rounded(q, q.abs().amax(-1, keepdim=True))
    size = torch.maximum(q.norm(dim=-1), queries.norm(dim=-1))
    if rounded is e4m3:  # products rounded to float16, terms cut off 13 bits below the largest
        lost = lost + norm * (q.shape[-1] * 33 / 32 / 8192 + q.shape[-1] / 32 / 1024)
    of_keys, of_queries = per_query_head(lost)[:, None], per_query_head(norm)[:, None]
    error = size[..., None] * of_keys + (q - queries).norm(dim=-1)[..., None] * of_queries
    return queries, per_query_head(held), error


def lines_of(layer: int, q: Tensor, k: Tensor, scale: float) -> list[str]:
    """One line for each way of rounding."""
    heads, n, _ = q.shape
    blocks = n // BLOCK

    def per_query_head(x: Tensor) -> Tensor:
        return x.repeat_interleave(heads // k.shape[0], 0)

    row, block = torch.arange(n)[:, None], torch.arange(blocks)[None]
    free = (block > 0) & (block < row // BLOCK)
    logits = torch.einsum("hnd,hmd->hnm", q, per_query_head(k)) * scale
    logits.masked_fill_(torch.arange(n)[None] > row, -torch.inf)
    exact = logits.unflatten(2, (blocks, BLOCK)).amax(-1)
    own = exact.gather(2, (row // BLOCK).expand(heads, n, 1))
    seen = torch.maximum(own, exact[:, :, :1])

    def share(rows: Tensor) -> float:
        groups = (rows | ~free).unflatten(1, (-1, GROUP)).all(2) & free[::GROUP]
        return float(groups.sum() / (free[::GROUP].sum() * heads))

    lines = []
    ways: tuple[tuple[str, Round, bool], ...] = (
        ("8-bit integers", integers, False),
        ("keys less their mean", integers, True),
        ("e4m3", e4m3, False),
    )
    for name, rounded, centred in ways:
        mean = k.mean(1, keepdim=True) if centred else torch.zeros_like(k[:, :1])
        keys = (k - mean).unflatten(1, (blocks, BLOCK))
        queries, held, error = rounded_by(rounded, q, keys)
        error *= scale
        top = torch.einsum("hnd,hbjd->hnbj", queries, held).amax(-1)
        offset = torch.einsum("hnd,hd->hn", q, per_query_head(mean[:, 0]))
        bound = scale * (top + offset[..., None]) + error
        if not bool((bound - exact)[:, free].ge(-1e-4).all()):
            raise AssertionError(f"layer {layer}, {name}: a logit is above its bound")
        shares = "  ".join(f"{share(exact < seen - c):.3f} {share(bound < seen - c):.3f}" for c in CUTS)
        lines.append(f"{layer}  {name:22}  {float(error[:, free].median()):5.2f}  {shares}")
    return lines


def quarter_line(layer: int, q: Tensor, k: Tensor, scale: float) -> str:
    """What a quarter of a block shows of those that stay, rounded as the kernels do it."""
    blocks = q.shape[1] // BLOCK  # and as many tiles
    queries, held, error = rounded_by(integers, q, k.unflatten(1, (blocks, BLOCK)))
    products = torch.einsum("hnd,hbjd->hnbj", queries, held).unflatten(-1, (2, BLOCK // 2))
    bound = scale * (products.amax(-1) + error[..., None])  # [heads, rows, blocks, halves of the keys]
    quarters = bound.unflatten(1, (blocks, BLOCK // GROUP, GROUP)).amax(3)  # [heads, tiles, groups, blocks, halves]
    free = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    free[:, 0] = False
    whole = quarters.amax((2, 4))[:, free]
    shares = []
    for left_out in LEFT_OUT:
        cut = whole.quantile(left_out, dim=1, keepdim=True)
        stays = whole >= cut
        shown = torch.stack([quarters[:, :, group, :, 0][:, free] >= cut for group in range(BLOCK // GROUP)])
        shares.append(float((shown & stays).sum() / (stays.sum() * len(shown))))
    return f"{layer}  shown by a quarter       " + "  ".join(f"{share:.3f}" for share in shares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--output", help="a file for what is printed")
    arguments = parser.parse_args()
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        layers = queries_and_keys(arguments.tokens // BLOCK * BLOCK)
    lines = [
        f"Bounds of logits on the embedded model, {arguments.tokens} tokens (benchmarks/bound_tightness.py).",
        "layer, rounding, median error in nats; for cuts of "
        f"{', '.join(f'{c:g}' for c in CUTS)} nats: share that can be skipped, share that is certain",
    ]
    for layer, (q, k, scale) in enumerate(layers):
        lines += lines_of(layer, q, k, scale)
    shares = ", ".join(f"{100 * share:g}" for share in LEFT_OUT)
    lines.append(
        f"layer; for cuts that leave out {shares} % of the pairs: of those that stay, share that a quarter shows"
    )
    for layer, (q, k, scale) in enumerate(layers):
        lines.append(quarter_line(layer, q, k, scale))
    text = "\n".join(lines) + "\n"
    print(text, end="")
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    main()
