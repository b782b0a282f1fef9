"""The training program. May import models and data.

Files here are commands (`python -m trainer.X`); folders are their parts.

Files:
    ablation       the paper's table over T and z, on a small data set
    algorithm/     what a training step computes
    average        averages a generator over another width after its run
    bench/         measures how fast a config trains, samples, reads and saves
    checkpoint/    what a run saves
    config/        every setting: defined, read strictly, checked
    configs/       one YAML file per data set
    demo/          a page to try a trained model by hand
    driver/        the process that starts the ranks
    edit           strokes, masks, variations, colours and details
    engine/        backward pass, gradient reduction, optimizer update
    evaluate/      measures the quality of samples
    export/        a trained model as files that other programs load
    modes          counts the modes of StackedMNIST in a run's samples
    plan/          size, cost and duration of a run before it starts
    points         quality of samples of the 25 Gaussians, and a picture
    rank/          one rank, from start to end
    report/        one page about runs, and where their hours went
    run            the command: parse, check, launch on Ray, summarize
    sample/        draws images from a run
    timing/        where the time of a run goes, recorded while it runs
    tracking/      from rank 0 to the trackers, through a spool
    translate      results of a model of image pairs for given images
    tune/          finds the fastest settings of a config for this machine
    verify_resume  proves that kills do not change the result
    walk           an animation that leads from sample to sample
    worker         the command that runs one rank, with or without torchrun
"""

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType


class _OwnPackages(MetaPathFinder):
    """Finds this project's packages next to this one. Others have a `models` or `data` too, and `python -m` would take
    those of the current folder."""

    names = frozenset({"models", "data", "cluster"})

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See `importlib`; None leaves a name to the other finders."""
        if fullname not in self.names:
            return None
        return importlib.machinery.PathFinder.find_spec(fullname, [str(Path(__file__).parents[1])], target)


sys.meta_path.insert(0, _OwnPackages())

import data as data  # noqa: E402 - it makes the imports that follow faster
