"""The GPU's own time of a call: the sum of its kernels and copies, as torch's profiler sees them.

Between two events on the stream there is also what the GPU waits for the host, and small calls are nothing else: a
host that needs 50 us to launch 5 us of work. A CUDA graph would leave the waiting out, but torch.cat's lines copy from
the CPU and cannot be captured. The profiler's sums can be had of everything.
"""

import torch

__all__ = ["gpu_times", "sums_between"]

MARK = "erfinv"  # in the name of the kernel that clears the cache, and of no other


def gpu_times(call, rounds: int) -> list[float]:
    """Microseconds of so many calls of `call`, a function of the round's number; the L2 cache is cleared before each.

    RuntimeError where the profiler sees nothing of the GPU (no CUPTI).
    """
    from torch.profiler import ProfilerActivity, profile

    cache = torch.zeros(2**26, device="cuda")  # 256 MiB, more than any GPU's cache
    call(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for number in range(rounds):
            cache.erfinv_()
            call(number)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    sums = sums_between(
        [(event.time_range.start, event.time_range.end, event.name) for event in events if event.time_range.end]
    )
    if len(sums) != rounds:
        raise RuntimeError(f"torch.profiler saw {len(sums)} of {rounds} calls on this GPU: is CUPTI there?")
    return sums


def sums_between(events: list[tuple[float, float, str]]) -> list[float]:
    """The times of `events` (start, end, name), in any order, added up from each mark to the next."""
    sums = []
    for start, end, name in sorted(events):
        if MARK in name:
            sums.append(0.0)
        elif sums:
            sums[-1] += end - start
    return sums
