"""Labels travel from the shards to both networks, are dropped by pure draws, and asked-for classes come out."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from data.shards.index import load_index
from data.storage.location import DataError
from models.diffusion import Diffusion, DiffusionConfig
from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from models.networks.build import build_discriminator, build_generator
from models.shapes import ImageForm
from tests.trainer.refusals import refusals
from tests.trainer.runs import Stopper, configure, state_of, train
from trainer.algorithm.adversarial import Adversarial
from trainer.algorithm.method import Players
from trainer.algorithm.pairs import Labels, RawBatch, draw_micro_batch
from trainer.algorithm.randomness import Draws, Purpose
from trainer.engine.interface import Engine
from trainer.evaluate import command as evaluate
from trainer.evaluate.reference import read_all
from trainer.plan.cost import count_costs
from trainer.rank.step.inputs import Inputs
from trainer.sample.command import main
from trainer.sample.draw import sample_run

CLASSES = ("data.num_classes=10",)
SMALL_G = GeneratorConfig(
    base_channels=8, channel_multipliers=(1,), num_res_blocks=1, attention_resolutions=(), latent_embedding_dim=16
)


@pytest.mark.parametrize("kind", ["unet", "mlp"])
def test_label_steers_the_generator_and_a_network_without_classes_is_what_it_was(kind):
    def build(num_classes: int):
        torch.manual_seed(0)
        config = replace(SMALL_G, kind=kind)
        return build_generator(config, ImageForm(8, 1, num_classes))

    plain, conditional = build(0), build(3)
    assert {*conditional.state_dict()} - {*plain.state_dict()} == {"mapping.label.embedding.weight"}
    x, t, z = torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), torch.randn(2, 100)
    styles = [conditional.mapping(z, torch.full((2,), label)) for label in range(4)]  # 3 is no label
    assert all(not torch.allclose(a, b) for i, a in enumerate(styles) for b in styles[:i])
    assert conditional(x, t, z, torch.tensor([0, 3])).shape == x.shape
    with pytest.raises(ValueError, match="has classes but got no labels"):
        conditional(x, t, z)


@pytest.mark.parametrize("kind", ["small", "mlp"])
def test_logits_gain_the_projection_of_the_last_features_on_the_label(kind):
    torch.manual_seed(0)
    config = DiscriminatorConfig(kind=kind, base_channels=4, time_embedding_dim=16)
    network = build_discriminator(config, ImageForm(8, 1, 3))
    x, t = torch.randn(2, 2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    features: list[torch.Tensor] = []
    network.head.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))  # pyright: ignore
    first, second = (network(*x, t, torch.full((2,), label)) for label in (0, 2))
    rows = network.label.embedding.weight  # pyright: ignore
    torch.testing.assert_close(second - first, features[0] @ (rows[2] - rows[0]))  # pyright: ignore


def test_labels_are_dropped_by_pure_draws_with_the_asked_for_probability():
    of_images = torch.arange(4000) % 10
    labels = Labels(of_images, 10, 0.3)
    whole = labels.drawn(Draws(1, 5, torch.arange(4000)), Purpose.D_LABEL_DROPOUT)
    part = Labels(of_images[40:60], 10, 0.3).drawn(Draws(1, 5, torch.arange(40, 60)), Purpose.D_LABEL_DROPOUT)
    assert torch.equal(whole[40:60], part)
    dropped = whole == 10
    assert torch.equal(whole[~dropped], of_images[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.03)  # four standard errors
    other = labels.drawn(Draws(1, 5, torch.arange(4000)), Purpose.G_LABEL_DROPOUT)
    assert not torch.equal(whole, other)
    assert torch.equal(
        replace(labels, dropout=0.0).drawn(Draws(1, 5, torch.arange(4000)), Purpose.D_LABEL_DROPOUT), of_images
    )


def test_both_updates_hand_the_labels_to_both_networks():
    seen: list[tuple[str, torch.Tensor]] = []

    class Net(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name, self.scale = name, torch.nn.Parameter(torch.ones(()))

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            seen.append((self.name, inputs[-1]))
            return self.scale * (inputs[0] if self.name == "g" else inputs[0].sum(dim=(1, 2, 3)))

    class Quiet(Engine):
        def __init__(self, module: torch.nn.Module) -> None:
            self.module = module

        def backward(self, loss: torch.Tensor) -> None: ...
        def step(self, *, wait: bool = True) -> None: ...

    diffusion = Diffusion.from_config(DiffusionConfig())
    of_images = torch.tensor([3, 1, 2, 0])
    images, draws = torch.zeros(4, 1, 4, 4, dtype=torch.uint8), Draws(0, 0, torch.arange(4))
    labels = Labels(of_images, 4, 0.0)
    raw = RawBatch(images, draws, latent_dim=2, flip=False, share=1.0, labels=labels)
    batch = draw_micro_batch(raw, diffusion)
    players = Players({"g": Quiet(Net("g")), "d": Quiet(Net("d"))}, diffusion)  # pyright: ignore[reportAbstractUsage]
    game = Adversarial(r1_gamma=1.0)
    for part in game.parts:
        game.update(part, players, [batch], 0)
    assert [name for name, _ in seen] == ["g", "d", "d", "g", "d"]
    assert all(torch.equal(label, of_images) for _, label in seen)


@pytest.mark.slow
def test_labels_that_reach_the_step_are_those_of_the_images(tiny, tiny_digits, tmp_path, monkeypatch):
    images, labels = read_all(tiny_digits)
    assert labels is not None
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    pairs: list[tuple[bytes, int]] = []
    load = Inputs.load

    def noting(self: Inputs, *given: Any) -> Any:
        for raw in (loaded := load(self, *given)):
            assert raw.labels is not None
            of_images = zip(raw.images, raw.labels.of_images, strict=True)
            pairs.extend((i.contiguous().numpy().tobytes(), int(label)) for i, label in of_images)
        return loaded

    monkeypatch.setattr(Inputs, "load", noting)
    train(configure(tiny, tmp_path, *CLASSES, "training.total_images=64"))
    assert len(pairs) == 64
    assert all(label_of[pixels] == label for pixels, label in pairs)


@pytest.mark.slow
def test_conditional_run_resumes_bitwise_draws_classes_in_turn_and_is_measured_by_them(
    tiny, tiny_digits, tmp_path, capsys
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = (*CLASSES, "training.label_dropout=0.2", "training.learning_rate_g.peak=0.05")
    train(configure(tiny, whole, *more))
    train(configure(tiny, parts, *more), Stopper(at=4))
    train(configure(tiny, parts, *more))
    ours, theirs = state_of(parts, 10), state_of(whole, 10)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    all_in_turn = sample_run(whole, 20, seed=0)
    assert torch.equal(sample_run(whole, 20, seed=0, classes=range(10)), all_in_turn)
    threes = sample_run(whole, 20, seed=0, classes=[3])
    same = [i for i in range(20) if torch.equal(threes[i], all_in_turn[i])]
    assert same == [3, 13]
    arguments = ["--run", str(whole), "--num", "4", "--out", str(tmp_path / "a.png")]
    assert main([*arguments, "--classes", "3,5"]) == 0
    assert main([*arguments, "--classes", "10"]) == 2
    assert "classes are 10; allowed: 0 to 9" in capsys.readouterr().err
    command = ["--run", str(whole), "--reference", str(tiny_digits), "--num", "20", "--json"]
    assert evaluate.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["class_agreement"]) == 10
    assert found["agreement"] == pytest.approx(sum(found["class_agreement"].values()) / 10)


def test_config_and_data_must_agree_on_the_classes(tiny, tiny_digits, tmp_path):
    from data.stream.pipeline import check_form

    config = configure(tiny, tmp_path, "data.num_classes=7")
    with pytest.raises(DataError, match=r"data\.num_classes is 7, but the data set at .* was prepared with 10"):
        check_form(config.data, load_index(tiny_digits))
    (line,) = refusals(training={"label_dropout": 0.5})
    assert "there are no labels to drop" in line


@pytest.mark.slow
def test_cost_counts_a_conditional_model(tiny, tmp_path):
    plain, conditional = (count_costs(configure(tiny, tmp_path, *more)) for more in ((), CLASSES))
    assert conditional.parameters_g - plain.parameters_g == 11 * 16
    assert conditional.parameters_d - plain.parameters_d == 11 * 8 * 4
