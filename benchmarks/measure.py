"""How everything here is measured: in pairs with ptuning-fast, on random inputs that change from call to call.

A machine's speed drifts, so the rounds of one implementation are never compared with rounds of another that ran a
minute before. Each round of `measure` is a copy of as many bytes, one call of ptuning-fast and one call of the
implementation in question; from round to round those two change places, since what ran before a short call shows in
its time. A ratio is taken over two such rounds; their median and quartiles are what the tables show. ptuning-fast is
measured against itself too, and how far that is from 1.00 is the noise.
"""

import ctypes
import statistics
import time
from collections import deque

import torch
from gpu_time import gpu_times

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LARGE = 2**24  # bytes; buffers of this size and more are fresh memory
WARM_UP = 8 if DEVICE.type == "cuda" else 4  # rounds before the rounds that count: on a GPU, one of every batch
CALLS, A_ROW = 50, 0.1  # on a GPU: calls, and seconds, in a row between two synchronisations, at most
GPU_ROUNDS = 30  # calls under the profiler


def fresh_memory():
    """On a CPU with glibc: give the free memory of this process back, so that the next buffers are mapped anew.

    Beyond 32 MiB that is what glibc does by itself, unless it finds a free block of that size among what others left
    behind. Mapping takes three quarters of the time of a large stage, so whoever had that luck would be four times as
    fast; measured this way nobody has it. NOTES.md says what that changes for a process that runs one implementation.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if DEVICE.type == "cpu" else None
    if trim is not None:
        trim(0)


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(benchmark, config, run, fast, *, copied=0, least_rounds=None):
    """Time `run` with pytest-benchmark, each round beside one of `fast`, and put the figures into `extra_info`.

    Args:
        benchmark, config: pytest-benchmark's fixture, and pytest's config. `--benchmark-max-time` bounds the seconds
            and `--benchmark-min-rounds` the rounds; `--benchmark-disable` calls `run` once.
        run, fast: functions of the round's number, from which they take their inputs.
        copied: bytes of the copy that shares the rounds, half of what the work must read and write; 0: no copy.
        least_rounds: fewest rounds, where a round is too long for `--benchmark-min-rounds`.
    """
    held = deque(maxlen=_held(copied))  # outputs stay alive for some rounds, so that no cache holds the next one's
    source = torch.randint(0, 127, (copied,), dtype=torch.int8, device=DEVICE) if copied else None
    seconds = {"fast": [], "copy": [], "run": []}

    def timed(name, call, *arguments):
        if copied >= LARGE:
            fresh_memory()
        start = time.perf_counter()
        held.append(call(*arguments))
        synchronize()
        seconds[name].append(time.perf_counter() - start)

    turn = iter(range(10**9))

    def before():
        number = next(turn)
        if copied:
            timed("copy", source.clone)
        if number % 2 == 0:
            timed("fast", fast, number)
        return (number,), {}

    def counted(number):
        timed("run", run, number)

    def after(number):
        if number % 2:
            timed("fast", fast, number)

    if benchmark.disabled:
        benchmark.pedantic(counted, setup=before, teardown=after)
        return
    start = time.perf_counter()
    for _ in range(WARM_UP if least_rounds is None or DEVICE.type == "cuda" else 1):
        (number,), _ = before()
        counted(number)
        after(number)
    a_round = (time.perf_counter() - start) / next(turn)
    turn = iter(range(10**9))
    for times in seconds.values():
        times.clear()
    wanted = int(float(config.getoption("benchmark_max_time")) / a_round)
    least = least_rounds or config.getoption("benchmark_min_rounds")
    rounds = min(max(wanted, least), 2000)
    benchmark.pedantic(counted, setup=before, teardown=after, rounds=rounds + rounds % 2, iterations=1)

    info = benchmark.extra_info
    info["rounds"] = len(seconds["run"])
    info["wall_us"] = quartiles(1e6 * second for second in seconds["run"])
    info["times_fast"] = quartiles(one / other for one, other in zip(*map(by_two, (seconds["run"], seconds["fast"]))))
    info["times_fast_in_all"] = sum(seconds["run"]) / sum(seconds["fast"])
    if copied:
        info["share_of_copy"] = quartiles(one / other for one, other in zip(seconds["copy"], seconds["run"]))
        info["gb_per_s"] = 2 * copied / statistics.median(seconds["run"]) / 1e9
        info["copy_gb_per_s"] = 2 * copied / statistics.median(seconds["copy"]) / 1e9
    held.clear()
    info["peak_mib"] = peak_bytes(lambda: run(0)) / 2**20
    if DEVICE.type == "cuda":
        held.clear()
        info |= _on_a_gpu(run, fast, source, held)


def _on_a_gpu(run, fast, source, held):
    """Wall time without a synchronisation after every call, which hides what a call costs the CPU; and the GPU's time.

    The latter of the stage alone: whole steps are as long as they take.
    """

    def kept(call):
        turn = iter(range(10**9))
        return lambda *_: held.append(call(next(turn)))

    def in_a_row(call):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return 1e6 * (time.perf_counter() - start) / calls

    run, fast, calls = kept(run), kept(fast), 1
    calls = max(1, min(CALLS, int(1e6 * A_ROW / max(in_a_row(run), in_a_row(fast)))))
    pairs = [(in_a_row(fast), in_a_row(run)) for _ in range(20)]
    info = {
        "wall_us": quartiles(time for _, time in pairs),
        "times_fast": quartiles(time / other for other, time in pairs),
    }
    if source is None:
        return info
    gpu_us, fast_us, copy_us = (
        quartiles(gpu_times(call, GPU_ROUNDS)) for call in (run, fast, lambda _: held.append(source.clone()))
    )
    return info | {
        "gpu_us": gpu_us,
        "gpu_times_fast": [time / fast_us[1] for time in gpu_us],
        "share_of_copy": [copy_us[1] / time for time in reversed(gpu_us)],
        "gb_per_s": 2 * source.numel() / gpu_us[1] / 1e3,
        "copy_gb_per_s": 2 * source.numel() / copy_us[1] / 1e3,
    }


def _held(copied):
    """How many outputs fill 256 MB, more than any GPU's cache; 64 at most. On a CPU each call frees its own."""
    return min(64, 1 + 2**28 // max(copied, 1)) if DEVICE.type == "cuda" else 0


def by_two(values):
    """The sums of the first and second value, of the third and fourth, and so on."""
    return [one + other for one, other in zip(values[::2], values[1::2])]


def quartiles(values):
    """[lower quartile, median, upper quartile]"""
    values = sorted(values)
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def peak_bytes(call):
    """The most memory that `call`, which has run before, has at a time beyond what there was; its result included."""
    if DEVICE.type == "cuda":
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    # On a CPU torch keeps no such count; its profiler sees each allocation and each release.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    peak = now = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
