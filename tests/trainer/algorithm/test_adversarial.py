"""What an update may touch, build and read; `test_recorded_run.py` checks its numbers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.diffusion import Diffusion, DiffusionConfig, sample_posterior
from models.dropout import masks_from
from tests.trainer.engine.conformance_rank import make_players, micro_batches
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.augmentation import AugmentationConfig
from trainer.algorithm.auxiliary import Auxiliary, ReconstructionConfig
from trainer.algorithm.losses import OBJECTIVES
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import RawBatch
from trainer.algorithm.randomness import Draws
from trainer.algorithm.schedules import Cosine, ProbabilityCosine
from trainer.engine.frozen import freeze

GAME = Adversarial(r1_gamma=1.0)
update_discriminator, update_generator = GAME.update_discriminator, GAME.update_generator


def gradients(players: Players) -> dict[str, list[Tensor | None]]:
    return {
        name: [p.grad for p in getattr(players, name).module.parameters()] for name in ("generator", "discriminator")
    }


def test_discriminator_update_builds_no_graph_through_the_generator():
    players, grad_modes = make_players(), []
    players.generator.module.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    update_discriminator(players, micro_batches(0, 16, 8), r1_gamma=1.0)
    assert grad_modes == [False, False]
    found = gradients(players)
    assert all(g is None for g in found["generator"])
    assert all(g is not None for g in found["discriminator"])


def test_generator_update_computes_no_gradient_of_the_discriminator_and_unfreezes_it():
    players = make_players()
    update_generator(players, micro_batches(0, 16, 8))
    found = gradients(players)
    assert all(g is None for g in found["discriminator"])
    assert all(g is not None for g in found["generator"])
    assert all(p.requires_grad for p in players.discriminator.module.parameters())


def test_what_stands_still_in_a_network_gets_no_gradient_in_either_update():
    players, name = make_players(), "blocks.0.conv1.weight"
    freeze(players.discriminator.module, "discriminator", [f"discriminator.{name}"])
    freeze(players.generator.module, "generator", ["generator.conv_in.*"])
    update_generator(players, micro_batches(0, 16, 8))
    update_discriminator(players, micro_batches(0, 16, 8), r1_gamma=1.0)
    without = {
        part: [n for n, p in getattr(players, part).module.named_parameters() if p.grad is None]
        for part in ("generator", "discriminator")
    }
    assert without == {"generator": ["conv_in.weight", "conv_in.bias"], "discriminator": [name]}


def test_discriminator_is_unfrozen_when_the_update_fails():
    players = make_players()

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    players.generator.backward = fail  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="out of memory"):
        update_generator(players, micro_batches(0, 16, 16))
    assert all(p.requires_grad for p in players.discriminator.module.parameters())


@pytest.mark.parametrize("update", [update_discriminator, update_generator])
def test_gradients_of_micro_batches_add_up_to_those_of_the_batch(update: Callable):
    options = {"r1_gamma": 1.0} if update is update_discriminator else {}
    whole, parts = make_players(), make_players()
    one, many = (update(players, micro_batches(0, 16, size), **options) for players, size in ((whole, 16), (parts, 4)))
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-5, rtol=1e-4, msg=name)
    for left, right in zip(gradients(whole).values(), gradients(parts).values(), strict=True):
        for a, b in zip(left, right, strict=True):
            if a is not None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)  # float32 sums in another order


@pytest.mark.parametrize("update", [update_discriminator, update_generator])
def test_a_micro_batch_that_fills_up_leaves_no_trace(update: Callable):
    options = {"r1_gamma": 1.0} if update is update_discriminator else {}
    alone, filled = make_players(), make_players()
    batches = micro_batches(0, 16, 8)
    filler = replace(batches[0], share=0.0)
    one, other = (update(p, b, **options) for p, b in ((alone, batches), (filled, [*batches, filler])))
    assert all(torch.equal(other[name], value) for name, value in one.items())
    for left, right in zip(gradients(alone).values(), gradients(filled).values(), strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(left, right, strict=True))  # pyright: ignore


ESTIMATED = Adversarial(
    OBJECTIVES["relativistic"],
    r1_gamma=1.0,
    r2_gamma=0.5,
    penalty="finite_difference",
    penalty_subset=2,
    penalty_epsilon=0.1,  # shorter ones would amplify the rounding of sums in another order
    logit_centring=0.1,
    global_batch_size=16,
)


def test_penalties_by_finite_differences_of_micro_batches_add_up_to_those_of_the_batch():
    whole, parts = make_players(), make_players()
    one, many = (
        ESTIMATED.update("d", players, micro_batches(0, 16, size, ESTIMATED), 0)
        for players, size in ((whole, 16), (parts, 4))
    )
    for name in one:
        torch.testing.assert_close(many[name], one[name], atol=1e-5, rtol=1e-4, msg=name)
    for a, b in zip(gradients(whole)["discriminator"], gradients(parts)["discriminator"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_a_step_without_penalties_draws_no_noise_for_them():
    game = replace(ESTIMATED, penalty_interval_steps=2)
    raw = RawBatch(torch.zeros(4, 1, 16, 16, dtype=torch.uint8), Draws(3, 1, torch.arange(4)), 8, False, 0.25)
    diffusion = Diffusion.from_config(DiffusionConfig())
    assert game.draw(raw, diffusion).penalty is None
    assert game.draw(replace(raw, draws=replace(raw.draws, step=2)), diffusion).penalty is not None
    assert GAME.draw(raw, diffusion).penalty is None


def test_weights_of_penalties_follow_their_course_over_the_images():
    course = Cosine(start=1.0, end=0.0, decay_images=64)
    game = Adversarial(r1_gamma=course, global_batch_size=16)
    batches, found = micro_batches(0, 16, 16), {}
    for step in (0, 2, 4):
        fixed, changing = make_players(), make_players()
        weight = {0: 1.0, 2: 0.5, 4: 0.0}[step]
        expected = update_discriminator(fixed, batches, r1_gamma=weight)
        found[step] = game.update("d", changing, batches, step)
        assert found[step].keys() == expected.keys()
        for a, b in zip(gradients(fixed)["discriminator"], gradients(changing)["discriminator"], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert "r1_penalty" in found[0]
    assert "r1_penalty" not in found[4]


def test_games_of_two_steps_are_equal_where_a_network_takes_the_same_numbers():
    falling = Cosine(start=1.0, end=0.5, decay_images=1000)
    auxiliary = Auxiliary(ReconstructionConfig(weight=falling), denoising=2.0)
    game = Adversarial(r1_gamma=0.5, penalty_interval_steps=4, auxiliary=auxiliary, global_batch_size=16)
    assert game.at(1, "d") == game.at(2, "d") != game.at(4, "d"), "R1 is due in step 4"
    assert game.at(4, "d") == game.at(8, "d")
    assert game.at(1, "g") != game.at(2, "g"), "the weight of the reconstruction has moved"
    assert game.at(100, "g") == game.at(104, "g"), "it has settled, and R1 is of D"
    assert game.at(1) != game.at(2)
    assert game.at(2).at(9) == game.at(2)
    rising = AugmentationConfig(probability=ProbabilityCosine(start=0.0, end=0.5, decay_images=1000))
    for part in game.parts:
        augmented = replace(game, augmentation=rising)
        assert augmented.at(1, part) != augmented.at(2, part)
        assert augmented.at(65, part) == augmented.at(66, part)


def test_centring_adds_the_mean_square_of_the_sum_of_both_logits():
    plain, centred = make_players(), make_players()
    batches = micro_batches(0, 16, 16)
    Adversarial(logit_centring=0.5).update_discriminator(centred, batches)
    pair, (G, D) = batches[0].pair_d, (plain.generator.module, plain.discriminator.module)
    with torch.no_grad():
        fake = sample_posterior(plain.diffusion, G(pair.x_t, pair.t, pair.z), pair.x_t, pair.t, pair.noise_posterior)
    real, fake = D(pair.x_tm1, pair.x_t, pair.t), D(fake, pair.x_t, pair.t)
    losses = GAME.objective.discriminator(real, fake)
    (sum(losses.values()) + 0.5 * ((real + fake) ** 2).mean()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for a, b in zip(gradients(plain)["discriminator"], gradients(centred)["discriminator"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_bf16_takes_finite_differences_in_float32():
    exact, low = make_players(), make_players(bf16=True)
    batches = micro_batches(0, 16, 16, ESTIMATED)
    expected, found = (ESTIMATED.update("d", players, batches, 0) for players in (exact, low))
    assert torch.equal(found["r1_penalty"], expected["r1_penalty"])
    torch.testing.assert_close(found["r2_penalty"], expected["r2_penalty"], rtol=0.05, atol=0)  # G computes in bf16


@pytest.mark.parametrize("update", [update_discriminator, update_generator])
def test_an_update_reads_no_scalar(update: Callable, monkeypatch):
    players, batches = make_players(), micro_batches(0, 16, 8)

    def refuse(*_: object) -> None:
        raise AssertionError("read a scalar off the device")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, refuse)
    options = {"r1_gamma": 1.0} if update is update_discriminator else {}
    statistics = update(players, batches, **options)
    monkeypatch.undo()
    assert all(isinstance(value, Tensor) for value in statistics.values())


def test_bf16_leaves_parameters_gradients_losses_and_r1_in_float32():
    exact, low = make_players(), make_players(bf16=True)
    batches = micro_batches(0, 16, 16)
    expected, found = (update_discriminator(p, batches, r1_gamma=1.0) for p in (exact, low))
    assert torch.equal(found["r1_penalty"], expected["r1_penalty"])
    assert torch.equal(found["loss_d_real"], expected["loss_d_real"])  # the reals of an R1 step pass in float32
    assert not torch.equal(found["loss_d_fake"], expected["loss_d_fake"])  # the fakes do not
    found |= update_generator(low, batches)
    assert {value.dtype for value in found.values()} == {torch.float32}
    for player in (low.generator, low.discriminator):
        assert {p.dtype for p in player.module.parameters()} == {torch.float32}
    assert {g.dtype for g in gradients(low)["discriminator"] if g is not None} == {torch.float32}


def test_bf16_leaves_r2_in_float32():
    exact, low = make_players(), make_players(bf16=True)
    expected, found = (update_discriminator(p, micro_batches(0, 16, 16), r2_gamma=1.0) for p in (exact, low))
    assert found["r2_penalty"].dtype == torch.float32
    assert "r1_penalty" not in found
    # The fakes come from G, which computes in bf16: 8 bits of mantissa.
    torch.testing.assert_close(found["r2_penalty"], expected["r2_penalty"], rtol=0.05, atol=0)


def test_r2_is_the_squared_slope_at_the_fakes_and_half_its_weight_enters_the_loss():
    batches = micro_batches(0, 16, 16)
    plain, with_r2 = make_players(), make_players()
    found = update_discriminator(with_r2, batches, r2_gamma=3.0)
    pair, (G, D) = batches[0].pair_d, (plain.generator.module, plain.discriminator.module)
    with torch.no_grad():
        fake = sample_posterior(plain.diffusion, G(pair.x_t, pair.t, pair.z), pair.x_t, pair.t, pair.noise_posterior)
    fake.requires_grad_()
    logits = D(fake, pair.x_t, pair.t)
    (slope,) = torch.autograd.grad(logits.sum(), fake, create_graph=True)
    penalty = slope.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(found["r2_penalty"], penalty.detach())
    losses = GAME.objective.discriminator(D(pair.x_tm1, pair.x_t, pair.t), logits)
    (sum(losses.values()) + 1.5 * penalty).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for a, b in zip(gradients(plain)["discriminator"], gradients(with_r2)["discriminator"], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_relativistic_generator_sees_the_reals_without_a_graph_through_them():
    players, grad_modes = make_players(), []
    players.discriminator.module.register_forward_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    batches = micro_batches(0, 16, 16)
    statistics = Adversarial(OBJECTIVES["relativistic"]).update_generator(players, batches)
    assert grad_modes == [True, False]
    pair, D = batches[0].pair_g, players.discriminator.module
    with torch.no_grad():
        x0_pred = players.generator.module(pair.x_t, pair.t, pair.z)
        fake = sample_posterior(players.diffusion, x0_pred, pair.x_t, pair.t, pair.noise_posterior)
        comparison = D(pair.x_tm1, pair.x_t, pair.t) - D(fake, pair.x_t, pair.t)
    torch.testing.assert_close(statistics["loss_g"], nn.functional.softplus(comparison).mean())


def test_bf16_losses_are_near_those_of_float32():
    exact, low = make_players(), make_players(bf16=True)
    batches = micro_batches(0, 16, 16)
    for update, options in ((update_discriminator, {}), (update_generator, {})):
        expected, found = (update(p, batches, **options) for p in (exact, low))
        for name in (name for name in expected if name.startswith("loss")):
            torch.testing.assert_close(
                found[name], expected[name], rtol=0.02, atol=0.02, msg=name
            )  # 8 bits of mantissa


def test_logits_are_told_apart_by_timestep():
    statistics = update_discriminator(make_players(), micro_batches(0, 16, 16))
    frequency = statistics["frequency_t"]
    assert frequency.shape == (4,)
    torch.testing.assert_close(frequency.sum(), torch.tensor(1.0))
    t = micro_batches(0, 16, 16)[0].pair_d.t
    torch.testing.assert_close(frequency, t.bincount(minlength=4) / 16)


RECONSTRUCTING = Auxiliary(ReconstructionConfig(weight=1.0))


def test_reconstruction_is_the_mean_square_of_x0_pred_minus_x0_and_its_weight_enters_the_loss():
    (batch,) = micro_batches(0, 16, 16)
    x0 = torch.rand_like(batch.pair_g.x_t) * 2 - 1
    plain, weighted, alone = make_players(), make_players(), make_players()
    update_generator(plain, [batch])
    game = replace(GAME, auxiliary=RECONSTRUCTING)
    found = game.update_generator(weighted, [replace(batch, x0=x0)], {"reconstruction": 3.0})
    pair = batch.pair_g
    with masks_from(alone.generator.module, pair.dropout):
        x0_pred = alone.generator.module(pair.x_t, pair.t, pair.z, pair.label)
    loss = (x0_pred - x0).square().mean()
    loss.backward()
    assert found["reconstruction"].item() == pytest.approx(loss.item(), rel=1e-5)
    parts = [gradients(players)["generator"] for players in (plain, weighted, alone)]
    for without, sum_, of_loss in zip(*parts, strict=True):
        assert without is not None and sum_ is not None and of_loss is not None
        torch.testing.assert_close(sum_, without + 3.0 * of_loss, atol=1e-6, rtol=1e-4)


def test_reconstruction_compares_with_the_images_that_both_updates_saw_mirrored():
    images = torch.arange(8, dtype=torch.uint8).view(1, 1, 2, 4).expand(6, 1, 2, 4)
    draws = Draws(0, 0, torch.arange(6))
    nearly_clean = DiffusionConfig(num_timesteps=1, beta_min=1e-8, beta_max=2e-8)
    diffusion = Diffusion.from_config(nearly_clean, torch.device("cpu"))
    game = Adversarial(auxiliary=RECONSTRUCTING)
    batch = game.draw(RawBatch(images, draws, latent_dim=2, flip=True, share=1.0), diffusion)
    assert batch.x0 is not None
    assert {tuple(x.flatten().tolist()) for x in batch.x0} == {
        tuple((x.float() / 127.5 - 1).flatten().tolist()) for x in (images[0], images[0].flip(-1))
    }
    torch.testing.assert_close(batch.pair_g.x_tm1, batch.x0, atol=1e-2, rtol=0)
    assert GAME.draw(RawBatch(images, draws, latent_dim=2, flip=True, share=1.0), diffusion).x0 is None
