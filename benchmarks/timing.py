"""Timing on one GPU: peers take turns in one process, device events around captured work, medians.

Clocks move with power and temperature, so two runs minutes apart differ by several per cent. What is compared is
therefore run A B A B ..., and reported as medians beside the SM clock that was seen meanwhile; where that is not
enough, also in cycles of that clock.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

try:  # torch brings it where it has CUDA
    import triton
    import triton.language as tl
except ImportError:
    triton = None


@dataclass(frozen=True)
class Work:
    """``body`` enqueues ``launches`` equal pieces of work, without synchronising.

    It is timed as a replayed CUDA graph, so that gaps between launches on the host do not count, unless ``eager``.
    ``samples``: how often it is timed in a turn, for short work beside peers that can afford few turns, and for eager
    work, which is slower right after other work of the host's than after itself.
    ``in_cycles``: cycles are counted as well.
    """

    body: Callable[[], object]
    launches: int = 1
    eager: bool = False
    samples: int = 1
    in_cycles: bool = False


@dataclass(frozen=True)
class Timing:
    """One peer's result: median microseconds per launch, and the samples it comes from; median cycles per launch."""

    us: float
    samples: list[float]
    cycles: float | None = None  # where they were counted, and could be

    @property
    def n(self) -> int:
        return len(self.samples)


@dataclass
class ClockSampler:
    """Reads the SM clock every 5 ms while the ``with`` block runs; ``median`` is None where it cannot be read."""

    samples: list[int] = field(default_factory=list)

    def __enter__(self) -> ClockSampler:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            if not self.read():
                return

    def read(self) -> bool:
        """Read the clock once. False: there is no NVML on this machine, and the report says null."""
        try:
            self.samples.append(torch.cuda.clock_rate())
        except Exception:
            return False
        return True

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def median(self) -> int | None:
        return int(statistics.median(self.samples)) if self.samples else None


if triton is not None:

    @triton.jit
    def _stamp_kernel(out):  # type: ignore[no-untyped-def]
        cycles = tl.inline_asm_elementwise("mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        tl.store(out, cycles)
        tl.store(out + 1, sm.to(tl.int64))


def _stamp() -> Tensor:
    """Enqueue a kernel of one CTA that writes its SM's cycle counter, and which SM that is."""
    out = torch.empty(2, dtype=torch.int64, device="cuda")
    _stamp_kernel[(1,)](out)
    return out


def _cycles_between(start: Tensor, end: Tensor) -> float | None:
    """None if two SMs wrote them, whose counters need not agree."""
    (first, sm), (last, same) = start.tolist(), end.tolist()
    return float(last - first) if sm == same else None


def _replay(work: Work) -> Callable[[], object]:
    """A function that enqueues ``work``. Runs it once, so that what happens at a first call is over."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work.body()
    torch.cuda.synchronize()
    if work.eager:
        return work.body
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work.body()
    return graph.replay


def interleaved(
    peers: Mapping[str, Work], rounds: int = 15, warmup: int = 3, watch_clock: bool = True
) -> tuple[dict[str, Timing], int | None]:
    """Time all peers in turns. Returns (timings by name, median SM clock in MHz or None).

    A power-limited clock is what the work just before has left: every second round goes backwards, so that no peer
    always follows the same one.
    watch_clock: a thread reads the clock meanwhile, which takes the interpreter from eager work; else it is read once,
    in the end.
    """
    replays = {name: _replay(work) for name, work in peers.items()}
    counted = {name for name, work in peers.items() if work.in_cycles and triton is not None}
    if counted:
        _stamp()  # compiles
    for _ in range(warmup):
        for replay in replays.values():
            replay()
    torch.cuda.synchronize()

    samples: dict[str, list[float]] = {name: [] for name in peers}
    cycles: dict[str, list[float]] = {name: [] for name in peers}
    clock = ClockSampler()
    with clock if watch_clock else contextlib.nullcontext():
        for i in range(rounds):
            for name, replay in list(replays.items())[:: 1 if i % 2 == 0 else -1]:
                for _ in range(peers[name].samples):
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    stamps = [_stamp()] if name in counted else []
                    start.record()
                    replay()
                    end.record()
                    stamps += [_stamp()] if name in counted else []
                    end.synchronize()
                    samples[name].append(start.elapsed_time(end) * 1e3 / peers[name].launches)
                    taken = _cycles_between(*stamps) if stamps else None
                    if taken is not None:
                        cycles[name].append(taken / peers[name].launches)
    if not watch_clock:
        clock.read()
    return {
        name: Timing(statistics.median(s), s, statistics.median(cycles[name]) if cycles[name] else None)
        for name, s in samples.items()
    }, clock.median
