"""The adversarial method: one update of D and one of G (DDGAN, arXiv 2112.07804, section 4 and appendix).

The engines decide how gradients are reduced and parameters updated; this file decides what is computed. It draws no
random numbers and reads no scalars off the device: it gets pairs already drawn and returns statistics as tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from models.diffusion import Diffusion, Sampler
from models.generator import GeneratorConfig
from models.shapes import Image, Latent, Logits, Predictions, Timestep
from trainer.algorithm.augmentation import VIEW_OF_D, VIEW_OF_G, AugmentationConfig, View
from trainer.algorithm.auxiliary import (
    Auxiliary,
    afd_loss,
    denoising_loss,
    reconstruction_loss,
    step_regression_loss,
    transport_loss,
    with_gradient,
)
from trainer.algorithm.losses import OBJECTIVES, Objective, Scalar, precise, unbalanced_transport
from trainer.algorithm.method import (
    Context,
    MethodSettings,
    Part,
    Players,
    Prediction,
    answer,
    context_of,
    generated,
    judged,
    seen,
)
from trainer.algorithm.pairs import MicroBatch, RawBatch, draw_micro_batch, laid_out
from trainer.algorithm.penalties import (
    PenaltyDraws,
    PenaltyKind,
    PenaltyName,
    Subset,
    finite_difference_penalty,
    gradient_penalty,
)
from trainer.algorithm.schedules import ProbabilityCosine, Weight, is_zero, value_at
from trainer.algorithm.statistics import (
    Statistic,
    Statistics,
    add_statistics,
    by_timestep,
    count,
    diagnostic,
    logit_statistics,
    mean,
    mean_by_timestep,
)
from trainer.engine.frozen import all_frozen
from trainer.engine.precision import exact_products

STATISTICS = (
    count("frequency_t", by_timestep=True),
    count("updates_g"),
    count("r1_steps"),
    count("r2_steps"),
    mean("loss_d", over="frequency_t"),
    mean("loss_d_real", over="frequency_t"),
    mean("loss_d_fake", over="frequency_t"),
    mean("r1_penalty", over="r1_steps", curve="r1"),
    mean("r2_penalty", over="r2_steps", curve="r2"),
    mean_by_timestep("logits_real", over="frequency_t", curve="logit_real", label="logits of real pairs"),
    mean_by_timestep("logits_fake", over="frequency_t", curve="logit_fake", label="logits of fake pairs"),
    mean("loss_g", over="updates_g"),
    diagnostic("logits_g", label="logits of generated pairs"),
)
"""`frequency_t` counts D's updates per timestep and `updates_g` counts G's updates; skipped updates are not counted."""


AUXILIARY = {
    **{name: mean(name, over="updates_g") for name in ("reconstruction", "transport", "afd")},
    **{name: mean(name, over="frequency_t") for name in ("denoising", "afd_regression")},
}
"""Reported by games with these losses, of G and of D, without their weights."""


@dataclass(frozen=True)
class Adversarial:
    """The adversarial game between G and D over the denoising steps.

    Attributes:
        objective: the losses of G and D.
        r1_gamma, r2_gamma: weights of R1 and R2; half of each multiplies the squared gradient norm.
        penalty_interval_steps: R1 and R2 are added to D's loss at steps 0, n, 2n, ...; they are not multiplied by n.
        penalty: whether R1 and R2 are exact, or estimated by finite differences.
        penalty_subset: finite differences are taken in every n-th group of images.
        penalty_epsilon: length of a finite difference.
        logit_centring: weight of the mean square of the sum of a pair's logits on real and fake in D's loss.
        auxiliary: losses of G and of D next to the game.
        augmentation: transforms of what D sees.
        global_batch_size: images of a step, which turn steps into images seen.
        first_step: step from which these images count.
    """

    objective: Objective = OBJECTIVES["non_saturating"]
    r1_gamma: Weight = 0.0
    r2_gamma: Weight = 0.0
    penalty_interval_steps: int = 1
    penalty: PenaltyKind = "exact"
    penalty_subset: int = 1
    penalty_epsilon: float = 0.01
    logit_centring: float = 0.0
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    global_batch_size: int = 1
    first_step: int = 0

    parts: tuple[Part, ...] = ("d", "g")
    statistics: tuple[Statistic, ...] = STATISTICS
    samplers: tuple[Sampler, ...] = ("ancestral",)
    prediction: Prediction = "x0"
    uses_latent: bool = True

    @classmethod
    def of(cls, settings: MethodSettings, generator: GeneratorConfig) -> "Adversarial":
        """The game that a config describes.

        Raises:
            ValueError: the settings contradict each other.
        """
        if settings.prediction != "x0":
            raise ValueError(
                f"training.prediction is {settings.prediction}, but with training.objective {settings.objective} the "
                "generator predicts x0: set training.prediction to x0, or training.objective to gaussian"
            )
        objective = OBJECTIVES[settings.objective]
        if objective.tau:
            objective = unbalanced_transport(settings.unbalanced_transport)
            if settings.gradient_normalization:
                raise ValueError(
                    "training.gradient_normalization is true, but with training.objective unbalanced_transport the "
                    "transport cost is a part of the game, whose gradient has to stay in proportion to it: set "
                    "training.gradient_normalization to false, or take another objective with training.transport"
                )
        if not objective.bounded and is_zero(settings.r1_gamma) and is_zero(settings.r2_gamma):
            raise ValueError(
                f"training.objective is {settings.objective}, whose discriminator loss has no lower bound without a "
                "gradient penalty, but training.r1_gamma and training.r2_gamma are 0: set one of them above 0"
            )
        auxiliary = Auxiliary(settings.reconstruction, settings.transport, settings.afd, settings.denoising)
        return cls(
            objective,
            r1_gamma=settings.r1_gamma,
            r2_gamma=settings.r2_gamma,
            penalty_interval_steps=settings.r1_interval_steps or 1,
            penalty=settings.penalty,
            penalty_subset=round(1 / settings.penalty_share),
            penalty_epsilon=settings.penalty_epsilon,
            logit_centring=settings.logit_centring,
            auxiliary=auxiliary,
            augmentation=settings.augmentation,
            global_batch_size=settings.global_batch_size,
            statistics=(*STATISTICS, *(AUXILIARY[name] for name in (*auxiliary.names, *auxiliary.names_of_d))),
        )

    @property
    def penalties(self) -> tuple[PenaltyName, ...]:
        """Names of the penalties whose weight is not zero."""
        return tuple(name for name, gamma in self._gammas.items() if not is_zero(gamma))

    @property
    def _gammas(self) -> dict[PenaltyName, Weight]:
        return {"r1": self.r1_gamma, "r2": self.r2_gamma}

    def without_penalties(self) -> "Adversarial":
        """The same game without R1 and R2."""
        return replace(self, r1_gamma=0.0, r2_gamma=0.0)

    def starting_at(self, step: int) -> "Adversarial":
        """The same game, whose weights with a course count the images from `step` on."""
        return replace(self, first_step=step)

    def at(self, step: int, part: Part | None = None) -> "Adversarial":
        """The same game with the numbers of one step. Weights of penalties are 0 where they are not due, and for G."""
        images = (step - self.first_step) * self.global_batch_size
        due = part != "g" and step % self.penalty_interval_steps == 0
        r1_gamma, r2_gamma = (value_at(gamma, images) if due else 0.0 for gamma in self._gammas.values())
        return replace(
            self,
            r1_gamma=r1_gamma,
            r2_gamma=r2_gamma,
            penalty_interval_steps=1,
            auxiliary=self.auxiliary.at(images, part),
            augmentation=self.augmentation.at(images),
        )

    def draw(self, raw: RawBatch, diffusion: Diffusion) -> MicroBatch:
        """A pair for each update, its view, and the noise of finite differences in the steps where they are due."""
        step = raw.draws.step
        return (self.at(step) if isinstance(step, int) else self)._draw(raw, diffusion)

    def _draw(self, raw: RawBatch, diffusion: Diffusion) -> MicroBatch:
        with_x0 = not {"reconstruction", "denoising"}.isdisjoint((*self.auxiliary.names, *self.auxiliary.names_of_d))
        drawn = self._with_views(draw_micro_batch(raw, diffusion, with_x0=with_x0), raw)
        if self.penalty == "exact" or not self.penalties:
            return drawn
        batch_size, *shape = drawn.pair_d.x_tm1.shape
        subset = Subset.of(self.penalty_subset, raw.start, batch_size, raw.group_size, self.global_batch_size)
        penalty = PenaltyDraws.of(raw.draws, tuple(shape), subset, self.penalties)
        noise = {name: laid_out(x, raw.memory_format) for name, x in penalty.noise.items()}
        return replace(drawn, penalty=replace(penalty, noise=noise))

    def update(self, part: Part, players: Players, batches: Sequence[MicroBatch], step: int = 0) -> Statistics:
        """One update of D, with penalties in the steps where they are due, or one update of G."""
        game = self.at(step, part)
        weights = game.auxiliary.weights_at(0)
        if part == "g":
            return self.update_generator(players, batches, weights)
        r1_gamma, r2_gamma = (value_at(gamma, 0) for gamma in game._gammas.values())
        return self.update_discriminator(players, batches, r1_gamma=r1_gamma, r2_gamma=r2_gamma, weights=weights)

    def _with_views(self, drawn: MicroBatch, raw: RawBatch) -> MicroBatch:
        """The batch with the transforms through which D sees it, if there are any."""
        if not self.augmentation.is_on:
            return drawn
        probability = self.augmentation.probability if raw.augmentation is None else raw.augmentation
        assert not isinstance(probability, ProbabilityCosine), "a course is followed by the game at a step"
        shape = tuple(drawn.pair_d.x_tm1.shape[1:])
        view_d, view_g = (
            View.of(raw.draws, purposes, shape, self.augmentation.transforms, probability)
            for purposes in (VIEW_OF_D, VIEW_OF_G)
        )
        return replace(drawn, pair_d=replace(drawn.pair_d, view=view_d), pair_g=replace(drawn.pair_g, view=view_g))

    def update_discriminator(
        self,
        players: Players,
        batches: Sequence[MicroBatch],
        *,
        r1_gamma: float = 0.0,
        r2_gamma: float = 0.0,
        weights: Mapping[str, float] | None = None,
    ) -> Statistics:
        """One update of D: real pairs (x_tm1, x_t) against pairs whose x_tm1 comes from G and the posterior.

        The reduction of D's gradients may still run at the end; `update_generator` waits for it after G's forward pass.

        Args:
            players: the networks.
            batches: as many micro-batches as the engines accumulate.
            r1_gamma: weight of the R1 penalty on the real x_tm1 in this step, in float32; 0: none.
            r2_gamma: weight of the R2 penalty on the generated x_tm1 in this step, in float32; 0: none.
            weights: of the losses of D's predictions in this step, by name.
        """
        total: Statistics = {}
        exact, predicts = self.penalty == "exact", self.auxiliary.predicts
        for batch in batches:
            pair = batch.pair_d
            with torch.no_grad():
                x0_pred, x_tm1_fake = generated(players, pair)
            context = context_of(players, pair)
            judge = partial(judged, players, pair, context=context)
            penalized, predicting = exact and r1_gamma > 0, "x0" in predicts
            real, logits_real, of_real = judge(pair.x_tm1.detach(), penalized=penalized, predicting=predicting)
            penalized, predicting = exact and r2_gamma > 0, "x_t" in predicts
            fake, logits_fake, of_fake = judge(x_tm1_fake, penalized=penalized, predicting=predicting)
            if players.augmentation and batch.share:
                players.augmentation.count(self.objective.certainty(logits_real.detach(), logits_fake.detach()))
            costed = self.objective.less_cost(logits_fake, x0_pred, pair.x_t)
            statistics = self.objective.discriminator(logits_real, costed)
            loss = reduce(add, statistics.values())
            if self.logit_centring:
                loss = loss + self.logit_centring * (precise(logits_real) + precise(logits_fake)).square().mean()
            predicted = self._predicted_losses(players, batch, x_tm1_fake, of_real, of_fake)
            statistics |= predicted
            for name, value in predicted.items():
                loss = loss + (weights or {}).get(name, 0.0) * value
            sides: tuple[tuple[PenaltyName, float, Image, Logits], ...] = (
                ("r1", r1_gamma, real, logits_real),
                ("r2", r2_gamma, fake, logits_fake),
            )
            for name, gamma, x_tm1, logits in sides:
                if gamma > 0:
                    if exact:
                        penalty = gradient_penalty(logits, x_tm1)
                    else:
                        penalty = self._estimated(players, batch, name, x_tm1, context)
                    loss = loss + 0.5 * gamma * penalty
                    statistics |= {f"{name}_penalty": penalty, f"{name}_steps": torch.ones_like(penalty)}
            players.discriminator.backward(loss * (batch.share * players.world_size))
            players.discriminator.step(wait=False)
            statistics |= logit_statistics(players.diffusion.num_timesteps, pair.t, logits_real, logits_fake)
            add_statistics(total, statistics, batch.share)
        return total

    def _predicted_losses(
        self,
        players: Players,
        batch: MicroBatch,
        x_tm1_fake: Image,
        of_real: Predictions | None,
        of_fake: Predictions | None,
    ) -> Statistics:
        """The losses of what D predicts of real and of generated images, as it sees them, without their weights."""
        pair, losses = batch.pair_d, Statistics()
        if of_real is not None:
            assert batch.x0 is not None, "a game whose discriminator denoises keeps the images"
            x0 = seen(players, pair, batch.x0)
            losses["denoising"] = denoising_loss(x0, self.auxiliary.prediction("x0", of_real))
        if of_fake is not None:
            x_tm1, x_t = (seen(players, pair, x) for x in (x_tm1_fake.detach(), pair.x_t))
            regressed = self.auxiliary.prediction("x_t", of_fake)
            losses["afd_regression"] = step_regression_loss(players.diffusion, x_tm1, x_t, pair.t, regressed)
        return losses

    def _estimated(
        self, players: Players, batch: MicroBatch, name: PenaltyName, x_tm1: Image, context: Context
    ) -> Scalar:
        """A penalty by finite differences in the images of its subset, with products in float32."""
        draws, pair, D = batch.penalty, batch.pair_d, players.forward("d")
        assert draws is not None, "a step with penalties draws their noise"

        def subset(x: Tensor) -> Tensor:
            some = draws.subset(x)
            return laid_out(some, players.memory_format) if x.dim() == 4 else some

        some = replace(pair, view=None if pair.view is None else pair.view.of_some(draws.subset))
        of_some = [x if x is None else subset(x) for x in context]
        with exact_products():
            penalty = finite_difference_penalty(
                lambda x: D(seen(players, some, x), *of_some), subset(x_tm1), draws.noise[name], self.penalty_epsilon
            )
        return draws.subset.weight * penalty

    def update_generator(
        self, players: Players, batches: Sequence[MicroBatch], weights: Mapping[str, float] | None = None
    ) -> Statistics:
        """One update of G, through a discriminator whose parameters are frozen.

        Args:
            players: the networks.
            batches: as many micro-batches as the engines accumulate.
            weights: of the auxiliary losses in this step, by name.
        """
        D, num_timesteps = players.forward("d"), players.diffusion.num_timesteps
        total: Statistics = {}
        with all_frozen(players.discriminator.module):
            for batch in batches:
                pair = batch.pair_g
                x0_pred, x_tm1_fake = generated(players, pair)
                players.discriminator.finish()
                context = context_of(players, pair)
                predicting, scale = "afd" in self.auxiliary.names, players.gradient_scale
                x_tm1_seen = seen(players, pair, x_tm1_fake)
                with players.autocast(pair.x_t):
                    logits, predictions = answer(D, x_tm1_seen, context, predicting=predicting and scale is None)
                logits_real = None
                if self.objective.compares:
                    with torch.no_grad(), players.autocast(pair.x_t):
                        logits_real = D(seen(players, pair, pair.x_tm1), *context)
                loss = self.objective.generator(self.objective.less_cost(logits, x0_pred, pair.x_t), logits_real)
                statistics = {"loss_g": loss, "logits_g": by_timestep(num_timesteps, pair.t, logits)}
                if scale:
                    loss = with_gradient(x_tm1_fake, loss, partial(scale, share=batch.share))
                    if predicting:
                        # By a graph of its own: ZeRO stage 3 lets go of the parameters after one backward pass.
                        x_tm1_seen = seen(players, pair, x_tm1_fake)
                        with players.autocast(pair.x_t):
                            _, predictions = answer(D, x_tm1_seen, context, predicting=True)
                for name in self.auxiliary.names:
                    if name == "afd" and predictions is not None:
                        regressed, x_t = self.auxiliary.prediction("x_t", predictions), seen(players, pair, pair.x_t)
                        statistics[name] = afd_loss(players.diffusion, x_tm1_seen, x_t, pair.t, regressed)
                    else:
                        statistics[name] = self._auxiliary(name, players.diffusion, batch, x0_pred, x_tm1_fake)
                    loss = loss + (weights or {}).get(name, 0.0) * statistics[name]
                players.generator.backward(loss * (batch.share * players.world_size))
                players.generator.step()
                add_statistics(total, statistics | {"updates_g": torch.ones_like(loss)}, batch.share)
        return total

    def _auxiliary(
        self, name: str, diffusion: Diffusion, batch: MicroBatch, x0_pred: Image, x_tm1_fake: Image
    ) -> Scalar:
        """An auxiliary loss of G, without its weight."""
        if name == "transport":
            return transport_loss(diffusion, x_tm1_fake, batch.pair_g.x_t, batch.pair_g.t)
        assert batch.x0 is not None, "a game with a reconstruction loss keeps the images"
        return reconstruction_loss(self.auxiliary.reconstruction, x0_pred, batch.x0)

    def x0_predictor(
        self, generator: Callable[[Image, Timestep, Latent], Image], diffusion: Diffusion
    ) -> Callable[[Image, Timestep, Latent], Image]:
        """G predicts x0 itself."""
        return generator
