"""The transforms of what the discriminator sees: against copies of pixels one by one, and within the two updates."""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.diffusion import sample_posterior
from models.discriminator import Discriminator, DiscriminatorConfig
from models.dropout import masks_from
from models.shapes import ImageForm
from tests.trainer.engine.conformance_rank import make_players, micro_batches
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.augmentation import (
    VIEW_OF_D,
    VIEW_OF_G,
    AdaptiveConfig,
    AdaptiveProbability,
    AugmentationConfig,
    TransformName,
    View,
)
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import Pair
from trainer.algorithm.randomness import Draws, Purpose, philox4x32
from trainer.algorithm.schedules import ProbabilityCosine

SEED, STEP = 2**40 + 3, 7
ALL: tuple[TransformName, ...] = ("flip", "shift", "cutout")


def draws(start: int, stop: int) -> Draws:
    return Draws(SEED, STEP, torch.arange(start, stop))


def view(num: int, size: int = 16, transforms: tuple[TransformName, ...] = ALL, probability: float = 0.7) -> View:
    return View.of(draws(0, num), VIEW_OF_D, (1, size, size), transforms, probability)


def words(sample: int, purpose: Purpose) -> list[float]:
    """Four uniform numbers in [0, 1) of one sample, exact in float64."""
    counter = tuple(torch.tensor(x) for x in (0, sample, STEP, int(purpose)))
    found = philox4x32(counter, (SEED % 2**32, SEED // 2**32))  # pyright: ignore[reportArgumentType]
    return [int(x) / 2**32 for x in found]


def copied(image: np.ndarray, sample: int, transforms: tuple[TransformName, ...], probability: float) -> np.ndarray:
    """One float64 image [C, H, W] as D sees it, pixel by pixel."""
    _, H, W = image.shape
    if "flip" in transforms:
        chosen, coin, *_ = words(sample, Purpose.D_AUGMENT_FLIP)
        if chosen < probability and int(coin * 2**32) % 2:
            image = np.stack([[row[::-1] for row in channel] for channel in image])
    if "shift" in transforms:
        chosen, *where, _ = words(sample, Purpose.D_AUGMENT_SHIFT)
        if chosen < probability:
            down, right = (
                math.floor(x * (2 * (side // 8) + 1)) - side // 8 for x, side in zip(where, (H, W), strict=True)
            )
            moved = np.zeros_like(image)
            for i in range(H):
                for j in range(W):
                    if 0 <= i + down < H and 0 <= j + right < W:
                        moved[:, i + down, j + right] = image[:, i, j]
            image = moved
    if "cutout" in transforms:
        chosen, *where, _ = words(sample, Purpose.D_AUGMENT_CUTOUT)
        if chosen < probability:
            image = image.copy()
            centre_i, centre_j = (math.floor(x * side) for x, side in zip(where, (H, W), strict=True))
            for i in range(centre_i - H // 4, centre_i - H // 4 + H // 2):
                for j in range(centre_j - W // 4, centre_j - W // 4 + W // 2):
                    if 0 <= i < H and 0 <= j < W:
                        image[:, i, j] = 0.0
    return image


@pytest.mark.parametrize("transforms", [("flip",), ("shift",), ("cutout",), ("shift", "cutout"), ALL])
@pytest.mark.parametrize("size", [8, 16, 20])
def test_each_transform_equals_a_copy_pixel_by_pixel(transforms, size):
    x = torch.randn(24, 3, size, size, dtype=torch.float64)
    found = view(24, size, transforms)(x)
    expected = np.stack([copied(image, i, transforms, 0.7) for i, image in enumerate(x.numpy())])
    assert torch.equal(found, torch.from_numpy(expected))
    assert len({tuple(y.shape) for y in (x, found)}) == 1
    unchanged = sum(torch.equal(a, b) for a, b in zip(x, found, strict=True))
    assert 0 < unchanged < 24 or transforms == ALL


def test_each_transform_is_drawn_with_its_probability_and_uniformly():
    num, size = 20_000, 16
    x = torch.arange(1.0, size * size + 1).view(1, 1, size, size).expand(num, -1, -1, -1)

    def share(of: Tensor) -> float:
        return of.double().mean().item()

    flipped = view(num, size, ("flip",), 0.6)(x)[:, 0, 0, 0] == size
    # A binomial share of 20,000 deviates by at most 0.0036; four deviations.
    assert share(flipped) == pytest.approx(0.3, abs=0.015)
    shifted = view(num, size, ("shift",), 0.6)
    corner = (shifted.rows[:, 0] * size + shifted.columns[:, 0]).bincount(minlength=size * size) / num
    # Shifts by -2 .. 2 in both directions; among them is none at all.
    assert (corner > 0).sum() == 25
    assert corner[0].item() == pytest.approx(0.4 + 0.6 / 25, abs=0.015)
    assert corner[corner > 0][1:] == pytest.approx(0.6 / 25, abs=0.005)
    cut = ~view(num, size, ("cutout",), 0.6).visible[:, 0]
    assert share(cut.flatten(1).any(1)) == pytest.approx(0.6, abs=0.015)
    whole = cut.flatten(1).sum(1) == 64
    # Of the 16 centres along a side, 9 leave the square of 8 within the image.
    assert share(whole) == pytest.approx(0.6 * (9 / 16) ** 2, abs=0.015)
    assert cut.float().mean(0).min() > 0.6 * 0.25 * 0.2


def test_transforms_are_independent_of_each_other_and_differ_between_the_updates():
    num = 20_000
    one, other = (View.of(draws(0, num), of, (1, 16, 16), ALL, 0.5) for of in (VIEW_OF_D, VIEW_OF_G))
    chosen = [
        found
        for v in (one, other)
        for found in (
            v.columns[:, 8] < v.columns[:, 7],
            v.rows[:, 0] > 0,
            ~v.visible[:, 0, 4:-4, 4:-4].flatten(1).all(1),
        )
    ]
    correlation = torch.corrcoef(torch.stack(chosen).double()) - torch.eye(6)
    assert correlation.abs().max() < 4 / num**0.5


def test_a_view_does_not_depend_on_the_micro_batch():
    whole = view(12)
    for start, stop in ((0, 4), (4, 5), (5, 12)):
        part = View.of(draws(start, stop), VIEW_OF_D, (1, 16, 16), ALL, 0.7)
        for name in ("rows", "columns", "rows_back", "columns_back", "visible"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[start:stop])


def test_probability_0_shows_the_images_bit_for_bit_and_1_transforms_all():
    x = torch.randn(64, 3, 16, 16)
    assert torch.equal(view(64, probability=0.0)(x), x)
    assert not any(
        torch.equal(a, b) for a, b in zip(view(64, transforms=("cutout",), probability=1.0)(x), x, strict=True)
    )


def test_first_and_second_derivatives_equal_finite_differences():
    v, x = view(3, 8), torch.randn(3, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    curved = lambda x: (v(x) ** 3).sum(dim=(1, 2, 3))  # noqa: E731
    assert torch.autograd.gradcheck(curved, (x,))
    assert torch.autograd.gradgradcheck(curved, (x,))


def test_noise_of_a_transformed_image_is_white():
    noise = torch.randn(4000, 1, 8, 8, dtype=torch.float64)
    v = view(4000, 8, ("flip", "shift"), 1.0)
    seen = v(noise)[v.visible]
    assert seen.mean().item() == pytest.approx(0, abs=0.01)
    assert seen.square().mean().item() == pytest.approx(1, abs=0.02)
    columns = v(noise)[:, 0, 2:-2, 2:-2].flatten(1)
    correlation = columns.T @ columns / len(columns)
    assert (correlation - torch.eye(16)).abs().max() < 4.5 / 4000**0.5 * 1.5


AUGMENTED = Adversarial(
    r1_gamma=1.0, r2_gamma=0.5, augmentation=AugmentationConfig(probability=0.7), global_batch_size=16
)


def judge(players: Players, pair: Pair, x_tm1: Tensor) -> Tensor:
    """D's logits for images as the pair's view shows them."""
    assert pair.view is not None
    return players.discriminator.module(pair.view(x_tm1), pair.view(pair.x_t), pair.t)


def fake_of(players: Players, pair: Pair) -> Tensor:
    G = players.generator.module
    with masks_from(G, pair.dropout):
        x0_pred = G(pair.x_t, pair.t, pair.z)
    return sample_posterior(players.diffusion, x0_pred, pair.x_t, pair.t, pair.noise_posterior)


def assert_same_gradients(left: Players, right: Players, part: str, atol: float = 1e-6) -> None:
    parameters = [getattr(players, part).module.parameters() for players in (left, right)]
    for a, b in zip(*parameters, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=atol, rtol=1e-3)  # float32 sums in another order


def test_the_discriminator_judges_views_and_is_penalized_at_the_images_before_them():
    (batch,), ours, plain = micro_batches(0, 16, 16, AUGMENTED), make_players(), make_players()
    found = AUGMENTED.update("d", ours, [batch], 0)
    pair = batch.pair_d
    with torch.no_grad():
        fake = fake_of(plain, pair)
    loss = torch.zeros(())
    logits = []
    for x, weight, name in ((pair.x_tm1.clone(), 1.0, "r1"), (fake, 0.5, "r2")):
        logits.append(judge(plain, pair, x.requires_grad_()))
        (slope,) = torch.autograd.grad(logits[-1].sum(), x, create_graph=True)
        assert pair.view is not None
        assert (slope == 0).any()  # where a pixel is hidden
        penalty = slope.square().flatten(1).sum(1).mean()
        torch.testing.assert_close(found[f"{name}_penalty"], penalty.detach())
        loss = loss + 0.5 * weight * penalty
    (loss + sum(AUGMENTED.objective.discriminator(*logits).values())).backward()
    assert_same_gradients(ours, plain, "discriminator")


@pytest.mark.parametrize("objective", ["non_saturating", "relativistic"])
def test_the_generator_learns_through_the_view(objective):
    game = replace(AUGMENTED, objective=OBJECTIVES[objective])
    (batch,), ours, plain = micro_batches(0, 16, 16, game), make_players(), make_players()
    found = game.update("g", ours, [batch], 0)
    pair = batch.pair_g
    logits, logits_real = judge(plain, pair, fake_of(plain, pair)), judge(plain, pair, pair.x_tm1).detach()
    loss = game.objective.generator(logits, logits_real)
    loss.backward()
    torch.testing.assert_close(found["loss_g"], loss.detach())
    assert_same_gradients(ours, plain, "generator")
    assert all(p.grad is not None and p.grad.any() for p in list(ours.generator.module.parameters())[-2:])


def test_the_generator_learns_nothing_from_hidden_pixels():
    (batch,), players = micro_batches(0, 16, 16, AUGMENTED), make_players()
    view = batch.pair_g.view
    assert view is not None
    hidden = replace(batch.pair_g, view=replace(view, visible=torch.zeros_like(view.visible)))
    AUGMENTED.update("g", players, [replace(batch, pair_g=hidden)], 0)
    assert not any(p.grad.any() for p in players.generator.module.parameters() if p.grad is not None)


@pytest.mark.parametrize("penalty", ["exact", "finite_difference"])
@pytest.mark.parametrize("part", ["d", "g"])
def test_gradients_of_augmented_micro_batches_add_up_to_those_of_the_batch(part, penalty):
    game = replace(AUGMENTED, penalty=penalty, penalty_subset=2, penalty_epsilon=0.1)
    whole, parts = make_players(), make_players()
    one, many = (
        game.update(part, players, micro_batches(0, 16, size, game), 0) for players, size in ((whole, 16), (parts, 4))
    )
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-5, rtol=1e-4, msg=name)
    assert_same_gradients(whole, parts, "discriminator" if part == "d" else "generator", atol=1e-5)


def test_an_augmented_update_reads_no_scalar(monkeypatch):
    players, batches = make_players(), micro_batches(0, 16, 8, AUGMENTED)

    def refuse(*_: object) -> None:
        raise AssertionError("read a scalar off the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    AUGMENTED.update("d", players, batches, 0)
    AUGMENTED.update("g", players, batches, 0)


@pytest.mark.parametrize("part", ["d", "g"])
def test_a_course_that_starts_at_0_begins_like_a_game_without_augmentation(part):
    rising = AugmentationConfig(probability=ProbabilityCosine(start=0.0, end=1.0, decay_images=32))
    plain, game = replace(AUGMENTED, augmentation=AugmentationConfig()), replace(AUGMENTED, augmentation=rising)
    one, other = (g.update(part, make_players(), micro_batches(0, 16, 16, g), 0) for g in (plain, game))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(("step", "probability"), [(10, 0.0), (11, 0.5), (12, 1.0), (13, 1.0)])
def test_a_probability_follows_its_course_from_the_start_of_its_stage(step, probability):
    rising = AugmentationConfig(probability=ProbabilityCosine(start=0.0, end=1.0, decay_images=32))
    game = replace(AUGMENTED, augmentation=rising).starting_at(10)
    assert game.at(step).augmentation.probability == pytest.approx(probability)


def test_without_augmentation_pairs_have_no_view():
    for config in (AugmentationConfig(), AugmentationConfig(probability=0.0, transforms=("cutout",))):
        (batch,) = micro_batches(0, 16, 16, replace(AUGMENTED, augmentation=config))
        assert batch.pair_d.view is None and batch.pair_g.view is None


class Gathers(TorchDispatchMode):
    """Counts the operations that move rows or columns: two for each image that is seen, and two for its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += func.overloadpacket is torch.ops.aten.gather
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("part", "of_pairs", "of_x_tm1"), [("d", 2 * 3, 2 * 2), ("g", 2 * 3, 2 * 2)])
def test_no_view_is_made_of_an_x_t_that_the_discriminator_does_not_see(part, of_pairs, of_x_tm1):
    game = replace(AUGMENTED, r1_gamma=0.0, r2_gamma=0.0)
    batches, found, counted = micro_batches(0, 16, 16, game), [], []
    marginal = Discriminator(
        DiscriminatorConfig(base_channels=4, time_embedding_dim=16, sees="marginal"), ImageForm(16, 1)
    )
    for sees_x_t in (True, False):
        players = replace(make_players(), sees_x_t=sees_x_t)
        players.discriminator.module = copy.deepcopy(marginal)
        with Gathers() as gathers:
            found.append(game.update(part, players, batches, 0))
        counted.append(gathers.total)
    assert counted == [of_pairs, of_x_tm1]
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


ADAPTIVE = AdaptiveConfig()


def test_a_probability_on_the_device_gives_the_same_views_as_a_number():
    for probability in (0.0, 0.1, 0.7, 1.0):
        number = view(500, probability=probability)
        tensor = torch.tensor(probability, dtype=torch.float64)
        on_device = View.of(draws(0, 500), VIEW_OF_D, (1, 16, 16), ALL, tensor)
        for name in ("rows", "columns", "visible"):
            assert torch.equal(getattr(on_device, name), getattr(number, name))


def test_an_adaptive_probability_stays_in_its_place_for_updates_that_are_recorded():
    adaptive = AdaptiveProbability(ADAPTIVE, 16, torch.device("cpu"))
    held = adaptive.value
    for step in range(1, 5):
        adaptive.count(torch.ones(16))
        adaptive.end_step(step)
    assert 0 < held.item() < 1
    adaptive.load({})
    assert adaptive.value is held and held.item() == 0


@pytest.mark.parametrize(
    ("objective", "signs"),
    [
        ("non_saturating", [1, 1, -1]),
        ("saturating", [1, 1, -1]),
        ("hinge", [1, 1, -1]),
        ("least_squares", [-1, 1, -1]),
        ("relativistic", [-1, 1, -1]),
        ("wasserstein", [-1, 1, -1]),
    ],
)
def test_each_objective_has_its_certainty(objective, signs):
    logits_real, logits_fake = torch.tensor([0.2, 0.6, -0.1]), torch.tensor([0.5, 0.1, 0.4])
    assert OBJECTIVES[objective].certainty(logits_real, logits_fake).sign().tolist() == signs


@pytest.mark.parametrize("objective", ["non_saturating", "relativistic"])
def test_the_discriminators_update_counts_the_signs_of_its_batch_without_what_fills_up(objective):
    config = AugmentationConfig(adaptive=ADAPTIVE)
    game = replace(AUGMENTED, augmentation=config, objective=OBJECTIVES[objective])
    batches, plain = micro_batches(0, 16, 8, game), make_players()
    players = replace(make_players(), augmentation=AdaptiveProbability(ADAPTIVE, 16, torch.device("cpu")))
    game.update("d", players, [*batches, replace(batches[0], share=0.0)], 0)
    assert players.augmentation is not None
    players.augmentation.end_step(1)
    expected = 0
    for batch in batches:
        pair = batch.pair_d
        with torch.no_grad():
            certainty = judge(plain, pair, pair.x_tm1)
            if objective == "relativistic":
                certainty = certainty - judge(plain, pair, fake_of(plain, pair))
        expected += sum(1 if c > 0 else -1 for c in certainty.tolist())
    assert players.augmentation.state()["signs"].item() == expected
