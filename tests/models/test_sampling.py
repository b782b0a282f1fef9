import torch
from torch import Tensor

from models.diffusion import Diffusion, DiffusionConfig, sample_posterior
from models.sampling import sample


def test_generator_that_knows_x0_yields_x0() -> None:
    x0 = torch.rand(3, 1, 4, 4) * 2 - 1
    diffusion = Diffusion.from_config(DiffusionConfig(num_timesteps=4))
    images = sample(
        lambda x_t, t, z: x0,
        diffusion,
        noise_T=torch.randn_like(x0),
        draw=lambda step: (torch.randn(3, 5), torch.randn_like(x0)),
    )
    # the last posterior mean gives x0 the weight 1 + 1e-7
    torch.testing.assert_close(images, x0, atol=1e-6, rtol=0)


def test_steps_run_from_the_last_to_the_first_with_fresh_draws() -> None:
    diffusion = Diffusion.from_config(DiffusionConfig(num_timesteps=3))
    latents, noises = torch.randn(3, 2, 5), torch.randn(3, 2, 1, 4, 4)
    calls: list[tuple[Tensor, Tensor]] = []

    def generator(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        calls.append((t, z))
        return 0.5 * x_t + z.mean()

    noise_T = torch.randn(2, 1, 4, 4)
    images = sample(generator, diffusion, noise_T=noise_T, draw=lambda step: (latents[step], noises[step]))

    x = noise_T
    for step, (t, z) in zip((2, 1, 0), calls, strict=True):
        assert t.tolist() == [step, step]
        assert torch.equal(z, latents[step])
        x = sample_posterior(diffusion, 0.5 * x + z.mean(), x, t, noises[step])
    assert torch.equal(images, x)


def test_sampling_builds_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    images = sample(
        lambda x_t, t, z: weight * x_t,
        Diffusion.from_config(DiffusionConfig(num_timesteps=1)),
        noise_T=torch.randn(1, 1, 2, 2),
        draw=lambda step: (torch.randn(1, 5), torch.randn(1, 1, 2, 2)),
    )
    assert not images.requires_grad
