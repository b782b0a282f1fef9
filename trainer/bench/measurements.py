"""Speed of sampling and reading."""

import time
from contextlib import closing
from functools import partial

import torch

from data.shards.index import load_index
from models.diffusion import Diffusion
from trainer.bench.steps.timing import Report
from trainer.checkpoint.snapshot import build_generator
from trainer.config.train_config import TrainConfig
from trainer.rank.step.share import Share, open_share
from trainer.rank.worker import prepare_torch
from trainer.sample.draw import sample_batches


def time_sampling(config: TrainConfig, num_images: int) -> Report:
    """Sample with fresh weights: the network does the same work as with trained ones.

    Args:
        config: the network's config; on a GPU it runs as with `trainer.sample --fast`.
        num_images: number of images timed, after a first batch.

    Returns:
        sampled_images_per_s.
    """
    prepare_torch(config)
    device = torch.device("cuda" if config.scaling.device == "gpu" else "cpu")
    generator = build_generator(config, device).eval().requires_grad_(False)
    diffusion = Diffusion.from_config(config.diffusion, device)
    draw = partial(sample_batches, generator, diffusion, config, seed=0, fast=device.type == "cuda")
    batches = draw(num=2**31)
    for _ in range(3):
        next(batches)
    began, done = time.perf_counter(), 0
    while done < num_images:
        done += len(next(batches))
    return {"sampled_images_per_s": done / (time.perf_counter() - began)}


def time_reading(config: TrainConfig, *, images_per_s: float, seconds: float) -> Report:
    """Read one rank's micro-batches at a device's pace: ask for the next one while the device processes the last.

    Args:
        config: its data section sets the number of loader processes.
        images_per_s: rate of the simulated device.
        seconds: duration, after the first micro-batch.

    Returns:
        images_per_s reached, waiting_share (of the time, in [0, 1]), longest_wait_s.
    """
    share = Share.of(config, 0, config.scaling.world_size)
    batches = open_share(config, load_index(config.data.path), share, 0, pin=False)
    waits: list[float] = []
    with closing(batches):
        num_images = len(next(batches).images)  # excludes the start of the loader processes
        began = time.perf_counter()
        free_at = began + num_images / images_per_s  # when the device has processed its images
        while time.perf_counter() < began + seconds:
            count = len(next(batches).images)
            arrived = time.perf_counter()
            waits.append(max(0.0, arrived - free_at))
            started = max(arrived, free_at)
            free_at = started + count / images_per_s
            num_images += count
            time.sleep(max(0.0, started - time.perf_counter()))
    elapsed = free_at - began
    return {
        "images_per_s": num_images / elapsed,
        "waiting_share": sum(waits) / elapsed,
        "longest_wait_s": max(waits),
    }
