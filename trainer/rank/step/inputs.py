"""A step's images on the device. They come into the same memory in each step, as a recorded update needs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from data.stream.batches import Batch
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import Conditions, Labels, RawBatch
from trainer.algorithm.randomness import Draws
from trainer.config.train_config import TrainConfig
from trainer.rank.step.share import Share


def split_planes(planes: Tensor, config: TrainConfig) -> tuple[Tensor, Conditions | None]:
    """The images, and those that are given with them, which a data set of pairs has as their last channels.

    Args:
        planes: uint8 [B, C, H, W], all channels of the data set.
        config: tells how many of them are given.
    """
    num_given = config.data.condition_channels
    if not num_given:
        return planes, None
    images, of_images = planes[:, :-num_given], planes[:, -num_given:]
    return images, Conditions(of_images, config.training.condition_dropout)


class Inputs:
    """What a method draws from: this rank's images of a step with their labels, and the step's number, as tensors."""

    def __init__(self, config: TrainConfig, share: Share, players: Players, device: torch.device) -> None:
        """Reserve the memory of the step's number; that of the images follows with the first of them.

        Args:
            config: of the stage.
            share: this rank's part of each global batch.
            players: give the layout of images, and the probability of augmentation if it follows D.
            device: of the rank.
        """
        self._config, self._share, self._players, self._device = config, share, players, device
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._held: list[tuple[Tensor, Tensor]] = []
        self._raw: list[RawBatch] = []

    def load(self, batches: Sequence[Batch], step: int) -> Sequence[RawBatch]:
        """Move a step's images to the device, in place of those of the step before.

        Args:
            batches: this rank's micro-batches, of the same sizes in each step.
            step: of the run, from 0.

        Returns:
            As many micro-batches as the engines accumulate, the same objects in each step.
        """
        if not self._held:
            for batch in batches:
                images, labels = (torch.empty_like(part, device=self._device) for part in batch[:2])
                self._held.append((images, labels))
            self._raw = [self._micro_batch(*held, i, len(held[0])) for i, held in enumerate(self._held)]
            # Every rank must call each reduction: a rank with fewer images pads with repeated images of weight zero.
            if missing := self._share.grad_accum_steps - len(batches):
                images, labels = (part[: self._share.group_size] for part in self._held[0])
                self._raw += [self._micro_batch(images, labels, 0, 0)] * missing
        for (images, labels), batch in zip(self._held, batches, strict=True):
            assert batch.images.shape == images.shape, "a step's micro-batches have the sizes of those before"
            images.copy_(batch.images, non_blocking=True)
            if self._config.data.num_classes:
                labels.copy_(batch.labels, non_blocking=True)
        self._step.fill_(step)
        return self._raw

    def _micro_batch(self, images: Tensor, labels: Tensor, index: int, weight: int) -> RawBatch:
        """Micro-batch number `index` with its draws; `weight` of its images count."""
        config, share, players = self._config, self._share, self._players
        first = share.start + index * share.micro_batch_size
        classes = None
        if config.data.num_classes:
            classes = Labels(labels, config.data.num_classes, config.training.label_dropout)
        samples = torch.arange(first, first + len(images), device=self._device)
        images, conditions = split_planes(images, config)
        return RawBatch(
            images,
            Draws(config.run.seed, self._step, samples),
            latent_dim=config.generator.latent_dim,
            flip=config.data.horizontal_flip,
            share=weight / share.global_batch_size,
            labels=classes,
            memory_format=players.memory_format,
            start=first,
            group_size=share.group_size,
            domain=config.data.domain,
            augmentation=players.augmentation.value if players.augmentation else None,
            conditions=conditions,
        )
