"""Short dense calls on CUDA straight to their launch, without torch's dispatcher (csrc/python/prepared.cpp).

At 1K tokens what the dispatcher and the operator do on the host takes longer than the kernel. So a call that has passed
the checks, and that is one launch without a workspace, is prepared once by the operator ``prepare_dense`` and found
again by shapes, strides, dtype, device and options. Where a mode, a transformation, tracing or profiling is active, the
call goes through the operator ``dense_attention``, which all of them see.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bsfa import _C, _library

_KIND_CUDA = 2  # of DLPack's devices


def _connect() -> bool:
    """Whether this torch and this build have what prepared calls need."""
    if _library.cuda_missing is not None:
        return False
    try:
        idle = idle_functions()
        exchange = Tensor.__dlpack_c_exchange_api__  # since torch 2.11
    except AttributeError:
        return False
    return connect(torch.ops.bsfa.prepared_runner(), _KIND_CUDA, exchange, idle)


def idle_functions() -> tuple[Callable[[], object], ...]:
    """What gives something true while anything but the kernel has a say in a call on plain tensors."""
    return (
        torch._C._len_torch_function_stack,
        torch._C._len_torch_dispatch_stack,
        torch._C._functorch.peek_interpreter_stack,
        torch._C._get_tracing_state,
        torch._C._autograd._profiler_enabled,
    )


def connect(runner: int, device_type: int, exchange: object, idle: tuple[Callable[[], object], ...]) -> bool:
    """Run prepared calls by the C function at address ``runner``, on devices of DLPack's ``device_type``."""
    return _C.prepared_connect(runner, device_type, Tensor, exchange, torch.empty_like, torch.contiguous_format, idle)


def remember(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None, softcap: float, scale: float
) -> bool:
    """Prepare a call of batched ``q``, ``k``, ``v`` that has passed the checks, if it is of the kind that can be.

    scale: what ``softmax_scale`` stands for. False if it cannot be told now, since more than the kernel has a say.
    """
    if not (READY and q.is_cuda):
        return True
    if not _C.prepared_idle():
        return False
    call = torch.ops.bsfa.prepare_dense(q, k, v, causal, scale, softcap)
    if call.numel() > 0:
        _C.prepared_remember(q, k, v, causal, softmax_scale, softcap, call.data_ptr(), call.numel())
    return True


#: The result for (q, k, v, causal, softmax_scale, softcap) if such a call has been prepared and can be run, else None.
run = _C.prepared_run
forget = _C.prepared_forget

READY = _connect()
