"""The kernels that take most of the time of a training step."""

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from trainer.bench.steps.timing import Report, open_loop
from trainer.config.train_config import TrainConfig

MAX_NAME = 100
"""Longest name of a kernel, in characters: those of templates fill pages."""


def heaviest_kernels(config: TrainConfig, top: int) -> Report:
    """Profile one log interval, after one to warm up.

    Args:
        config: as in `steps.timing.open_loop`, with two log intervals.
        top: number of kernels.

    Returns:
        By name, each kernel's share of the time of all kernels, in [0, 1], largest first; on a CPU, of the operators'.
        First the `device_s_per_step` that all of them take together.
    """
    interval = config.tracking.log_interval_steps
    with open_loop(config) as loop:
        loop.run(interval)
        loop.take_metrics()
        on_gpu = loop.ranks.device.type == "cuda"
        # Without the operators of the host the profile of a GPU is small, and does not slow the steps.
        with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
            loop.run(2 * interval)
            loop.take_metrics()
    events = profiler.key_averages()
    if on_gpu:
        times = {event.key: event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA}
    else:
        times = {event.key: event.self_cpu_time_total for event in events}
    total_us = sum(times.values())
    heaviest = sorted(times.items(), key=lambda named: named[1], reverse=True)[:top]
    return {"device_s_per_step": total_us / 1e6 / interval} | {
        " ".join(name.split())[:MAX_NAME]: time_us / total_us for name, time_us in heaviest
    }
