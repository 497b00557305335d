from collections.abc import Callable
from typing import Any

from torch import Tensor

def build_info() -> dict[str, str]: ...
def kernels() -> list[dict[str, Any]]: ...
def prepared_connect(
    runner: int,
    device_type: int,
    tensor_type: type[Tensor],
    exchange: object,
    empty_like: Callable[..., Tensor],
    contiguous_format: object,
    idle: tuple[Callable[[], object], ...],
    /,
) -> bool: ...
def prepared_idle() -> bool: ...
def prepared_remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    softmax_scale: float | None,
    softcap: float,
    address: int,
    size: int,
    /,
) -> bool: ...
def prepared_run(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float | None, softcap: float, /
) -> Tensor | None: ...
def prepared_forget() -> None: ...
