"""The training forward: plain torch over the parameters of a Hugging Face LlamaForCausalLM, one compiled block."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

HEAD_DIM = 64
EPS = 1e-5
THETA = 1e6


def make_config(tiny: bool = False) -> LlamaConfig:
    """The shipped architecture (7.6 M parameters), or a toy one for a dry run."""
    return LlamaConfig(
        vocab_size=2048,
        hidden_size=128 if tiny else 384,
        intermediate_size=192 if tiny else 640,
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=4 if tiny else 6,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        rms_norm_eps=EPS,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, L, D] in the half-split layout; cos, sin [L, D]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm1: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    norm2: Tensor,
    wgate: Tensor,
    wup: Tensor,
    wdown: Tensor,
) -> Tensor:
    """One Llama layer on x [B, L, hidden] in x's dtype; float32 master weights are cast here."""
    dtype, (batch, length, _) = x.dtype, x.shape
    hq, hkv = wq.shape[0] // HEAD_DIM, wk.shape[0] // HEAD_DIM
    h = F.rms_norm(x, x.shape[-1:], norm1.to(dtype), EPS)
    qkv = F.linear(h, torch.cat((wq, wk, wv)).to(dtype)).view(batch, length, hq + 2 * hkv, HEAD_DIM).transpose(1, 2)
    q, k, v = qkv.split((hq, hkv, hkv), 1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + F.linear(h.transpose(1, 2).reshape(batch, length, hq * HEAD_DIM), wo.to(dtype))
    h = F.rms_norm(x, x.shape[-1:], norm2.to(dtype), EPS)
    gate, up = F.linear(h, torch.cat((wgate, wup)).to(dtype)).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, wdown.to(dtype))


def head(x: Tensor, norm: Tensor, embedding: Tensor) -> Tensor:
    """Final norm and tied output projection: logits [.., vocab] in float32."""
    h = F.rms_norm(x, x.shape[-1:], norm.to(x.dtype), EPS)
    return F.linear(h, embedding.to(x.dtype)).float()


def weighted_loss(x: Tensor, norm: Tensor, embedding: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of weight * (nll + 1e-4 * logsumexp^2), nll of each token) of x [N, hidden]."""
    logits = head(x, norm, embedding)
    lse = logits.logsumexp(-1)
    nll = lse - logits.gather(-1, target[:, None]).squeeze(-1)
    return (weight * (nll + 1e-4 * lse.square())).sum(), nll.detach()


def graded(x: Tensor, norm: Tensor, embedding: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(whether the argmax is the target, nll) of each token of x [N, hidden]."""
    logits = head(x, norm, embedding)
    nll = logits.logsumexp(-1) - logits.gather(-1, target[:, None]).squeeze(-1)
    return logits.argmax(-1) == target, nll


class Net:
    """Holds the model and runs it: `loss` for training, `grade` for teacher-forced evaluation."""

    def __init__(self, model: LlamaForCausalLM, device: torch.device, compiled: bool):
        self.model = model
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layers = [
            (
                layer.input_layernorm.weight,
                layer.self_attn.q_proj.weight,
                layer.self_attn.k_proj.weight,
                layer.self_attn.v_proj.weight,
                layer.self_attn.o_proj.weight,
                layer.post_attention_layernorm.weight,
                layer.mlp.gate_proj.weight,
                layer.mlp.up_proj.weight,
                layer.mlp.down_proj.weight,
            )
            for layer in model.model.layers
        ]
        self.embedding = model.model.embed_tokens.weight
        self.norm = model.model.norm.weight

        def wrap(f: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(f, dynamic=False, fullgraph=True) if compiled else f

        torch._dynamo.config.cache_size_limit = 64
        self.block, self.weighted, self.graded = wrap(block), wrap(weighted_loss), wrap(graded)
        self.rope: dict[int, tuple[Tensor, Tensor]] = {}
        self.backend: dict[int, SDPBackend] = {}

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self.rope:
            inv = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, device=self.device, dtype=torch.float32) / HEAD_DIM)
            angle = torch.outer(torch.arange(length, device=self.device, dtype=torch.float32), inv)
            angle = torch.cat((angle, angle), -1)
            self.rope[length] = (angle.cos().to(self.dtype), angle.sin().to(self.dtype))
        return self.rope[length]

    def pick_backend(self, batch: int, length: int) -> None:
        """Times cuDNN's and torch's flash attention at one shape and keeps the faster."""
        if self.device.type != "cuda":
            return
        heads = self.layers[0][1].shape[0] // HEAD_DIM
        kv = self.layers[0][2].shape[0] // HEAD_DIM
        times: dict[SDPBackend, float] = {}
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            q = torch.randn(batch, length, heads, HEAD_DIM, device=self.device, dtype=self.dtype).transpose(1, 2)
            k = torch.randn(batch, length, kv, HEAD_DIM, device=self.device, dtype=self.dtype).transpose(1, 2)
            q, k, v = (t.detach().requires_grad_() for t in (q, k, k.clone()))
            try:
                with sdpa_kernel(backend):
                    for i in range(4):
                        if i == 1:
                            torch.cuda.synchronize()
                            start = time.perf_counter()
                        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
                        out.backward(torch.ones_like(out))
                    torch.cuda.synchronize()
                times[backend] = (time.perf_counter() - start) / 3
            except RuntimeError as error:
                print(f"{backend} at {length}: {str(error)[:100]}", flush=True)
        self.backend[length] = min(times, key=lambda b: times[b])
        print(f"attention {batch}x{length}:", {b.name: f"{t * 1e3:.2f} ms" for b, t in times.items()}, flush=True)

    def hidden(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        cos, sin = self.tables(length)
        x = F.embedding(ids, self.embedding).to(self.dtype)
        backend = self.backend.get(length)
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            for weights in self.layers:
                x = self.block(x, cos, sin, *weights)
        return x.flatten(0, 1)

    def loss(self, ids: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weighted mean loss, nll [N]) of ids, target, weight [B, L]."""
        total, nll = self.weighted(self.hidden(ids), self.norm, self.embedding, target.flatten(), weight.flatten())
        return total / weight.sum(), nll

    @torch.no_grad()
    def grade(self, ids: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(right [N], nll [N]) of ids, target [B, L]."""
        return self.graded(self.hidden(ids), self.norm, self.embedding, target.flatten())

    def save(self, folder: Path) -> None:
        """config.json and one bf16 model.safetensors, written under another name first."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.model.config
        config.architectures = ["LlamaForCausalLM"]
        config.dtype = "bfloat16"
        config.to_json_file(folder / "config.json")
        state = {
            n: p.detach().to("cpu", torch.bfloat16).contiguous()
            for n, p in self.model.named_parameters()
            if not n.startswith("lm_head")
        }
        save_file(state, folder / "model.safetensors.part", metadata={"format": "pt"})
        (folder / "model.safetensors.part").replace(folder / "model.safetensors")
