"""Evaluation during training: figures for the averaged weights at an interval of images."""

import itertools
import logging
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from data.shards.index import load_index
from data.storage.errors import UserError
from data.storage.location import is_remote, local_path
from models.diffusion import Diffusion
from trainer.config.sections import RENAMED_FIGURES
from trainer.config.train_config import TrainConfig
from trainer.engine.ranks import Ranks
from trainer.evaluate.judges import CLASSIFIER, open_network
from trainer.evaluate.kept import cache_folder, load_statistics
from trainer.evaluate.networks.features import FeatureNetwork, through
from trainer.evaluate.quality import named
from trainer.evaluate.reference import (
    FAILURES,
    FeaturesError,
    Reference,
    evaluate_against,
    load_reference,
    pairs_of,
)
from trainer.sample.conditions import given_pairs
from trainer.sample.draw import sample_batches

log = logging.getLogger(__name__)

NEED_IMAGES = {"kid", *(names["kid"] for names in RENAMED_FIGURES.values())}
NEED_IMAGES |= {"precision", "recall", "density", "coverage"}
"""Figures that compare samples with the images of a reference, not only with their statistics."""
SEED = 0
"""Seed of samples, classifier and subsets: fixed throughout a run, so that its curve shows only the weights."""


def is_due(images: int, step_images: int, interval_images: int | None) -> bool:
    """Whether the step that ended at `images` images passed a multiple of the interval."""
    return interval_images is not None and images // interval_images > (images - step_images) // interval_images


def check_evaluation(config: TrainConfig) -> None:
    """Refuse at the start what would fail at the first evaluation.

    Raises:
        UserError: network or reference cannot be used, they give no figure of the name of checkpoint.keep_best, or the
            data set has no labels to train a classifier with.
    """
    settings, form, best = config.evaluation, config.image_form, config.checkpoint.keep_best
    if settings.interval_images is None:
        return
    seen_images = through(settings.through)(torch.zeros(2, *form.shape, dtype=torch.uint8))
    if settings.network not in (None, CLASSIFIER):
        network = open_network(settings.network, config.data.path, seed=SEED)
        seen = network(seen_images)
        if seen.logits is None and best == "inception_score":
            raise UserError(
                f"checkpoint.keep_best is {best}, which evaluation.network {settings.network} does not measure, as it "
                "knows no classes: keep the best by another figure"
            )
    elif load_index(config.data.path).num_classes is None:
        raise UserError(
            f"{config.data.path} has no labels, so no classifier can be trained to evaluate with: give "
            "evaluation.network lite0 or a TorchScript file, or set evaluation.interval_images to null"
        )
    if settings.reference is not None and is_remote(settings.reference):
        load_index(settings.reference)
    elif settings.reference is not None and not local_path(settings.reference).exists():
        raise UserError(
            f"evaluation.reference is {settings.reference}, which does not exist: name a prepared data set, a folder "
            "of PNGs or an .npz, or set it to null for the data set of the run"
        )
    only_statistics = settings.reference is not None and settings.reference.endswith(".npz")
    if only_statistics and best in NEED_IMAGES and load_statistics(local_path(settings.reference or "")) is not None:
        raise UserError(
            f"checkpoint.keep_best is {best}, which needs the images of the reference, but evaluation.reference "
            f"{settings.reference} holds their statistics alone: name the images, or keep the best by a Fréchet "
            "distance"
        )


class RunEvaluation:
    """Network and reference of a run, created at the first evaluation; every method is a collective."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        self._held: tuple[FeatureNetwork, Reference] | None = None

    def figures(self, generator: nn.Module, diffusion: Diffusion) -> dict[str, float]:
        """Figures by their names in `Quality`, as used for the curves; none if the features are not finite.

        Args:
            generator: holds the averaged weights, the same on every rank.
            diffusion: this process's tables.

        Raises:
            UserError, OperationError, OSError: on every rank, if one cannot read the data set or the reference.
        """
        network, reference = self._held = self._held or self._prepare()
        settings, ranks = self._config.evaluation, self._ranks
        try:
            with ExitStack() as opened:
                given = ranks.all_do(lambda: opened.enter_context(self._given()), *FAILURES)
                drawn = sample_batches(
                    generator,
                    diffusion,
                    self._config,
                    num=settings.num_samples,
                    seed=SEED,
                    rank=ranks.rank,
                    world_size=ranks.world_size,
                    **given,
                )
                batches = zip(itertools.count(ranks.rank, ranks.world_size), drawn, strict=False)
                measured = evaluate_against(batches, reference, network, ranks, codec=settings.through, seed=SEED)
        except FeaturesError as error:  # on all ranks
            log.warning("this evaluation is left out: %s", error)
            return {}
        figures = named(measured.quality, measured.judge)
        return {name: value for name, value in figures.items() if value is not None}

    def _given(self) -> AbstractContextManager[dict[str, Any]]:
        reference = self._config.evaluation.reference
        return given_pairs(self._config, None if reference is None else pairs_of(reference))

    def _prepare(self) -> tuple[FeatureNetwork, Reference]:
        settings, path = self._config.evaluation, self._config.data.path
        # Every rank trains the classifier: the result depends only on the data and the seed.
        name, device = settings.network or CLASSIFIER, self._ranks.device
        network = self._ranks.all_do(lambda: open_network(name, path, seed=SEED, device=device), *FAILURES)
        return network, load_reference(settings.reference or path, network, self._ranks, cache_folder())
