"""The denoising step of a Denoising Diffusion GAN (Xiao, Kreis, Vahdat, ICLR 2022) as a scheduler of diffusers."""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor


class DDGANScheduler(SchedulerMixin, ConfigMixin):
    """Maps x_t and a prediction to x_tm1. A step is numbered T-1 .. 0, and x_tm1 of step 0 is the image.

    Args:
        betas: noise variance of each of the T steps, from the cleanest to the noisiest.
        prediction_type: what the generator predicts: `sample` (x0) or `epsilon` (the noise in x_t).
    """

    order = 1

    @register_to_config
    def __init__(self, betas: Sequence[float], prediction_type: str = "sample") -> None:
        # Products in float32, in this order, as in training.
        beta = torch.tensor(betas, dtype=torch.float64).float()
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        alpha_bar_prev = torch.cat([torch.ones(1), alpha_bar[:-1]])
        forward_alpha_bar = (1 - torch.cat([torch.tensor([1e-8]), beta])).cumprod(0)
        self.sqrt_alpha_bar = forward_alpha_bar.sqrt()
        self.sqrt_one_minus_alpha_bar = (1 - forward_alpha_bar).sqrt()
        self.coef_x0 = beta * alpha_bar_prev.sqrt() / (1 - alpha_bar)
        self.coef_xt = (1 - alpha_bar_prev) * alpha.sqrt() / (1 - alpha_bar)
        self.deviation = (beta * (1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
        self.init_noise_sigma = 1.0
        self.timesteps = torch.arange(len(betas) - 1, -1, -1)

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str = "cpu") -> None:
        """Put the steps on a device; their number is that of the training."""
        if num_inference_steps not in (None, len(self.config["betas"])):
            raise ValueError(
                f"this model was trained for {len(self.config['betas'])} steps and draws in no other number"
            )
        self.timesteps = torch.arange(len(self.config["betas"]) - 1, -1, -1, device=device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """The generator takes x_t as it is."""
        return sample

    def predicted_x0(self, model_output: Tensor, timestep: int, sample: Tensor) -> Tensor:
        """x0_pred of the generator's output [B, C, H, W] for x_t `sample`."""
        if self.config["prediction_type"] == "sample":
            return model_output
        noise = _at(self.sqrt_one_minus_alpha_bar, timestep + 1, sample) * model_output
        return ((sample - noise) / _at(self.sqrt_alpha_bar, timestep + 1, sample)).clamp(-1.0, 1.0)

    def denoised(self, x0_pred: Tensor, timestep: int, sample: Tensor, noise: Tensor) -> Tensor:
        """x_tm1 from q(x_tm1 | x_t, x0_pred), Eq. 5 of the paper; all [B, C, H, W], `sample` is x_t."""
        mean = _at(self.coef_x0, timestep, sample) * x0_pred + _at(self.coef_xt, timestep, sample) * sample
        return mean + _at(self.deviation, timestep, sample) * noise

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Draw x_tm1.

        Args:
            model_output: the generator's output for x_t, [B, C, H, W].
            timestep: T-1 .. 0.
            sample: x_t, [B, C, H, W].
            generator: source of the noise if none is given.
            noise: standard normal, [B, C, H, W]; it has no effect at step 0.
            return_dict: return an object with `prev_sample` instead of a tuple.
        """
        if noise is None:
            noise = torch.randn(sample.shape, generator=generator, dtype=sample.dtype).to(sample.device)
        x0_pred = self.predicted_x0(model_output, int(timestep), sample)
        x_tm1 = self.denoised(x0_pred, int(timestep), sample, noise)
        return SchedulerOutput(prev_sample=x_tm1) if return_dict else (x_tm1,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of images [B, C, H, W]: the input of each step in `timesteps` [B]."""
        image, deviation = (
            table[timesteps.cpu() + 1].to(original_samples).view(-1, 1, 1, 1)
            for table in (self.sqrt_alpha_bar, self.sqrt_one_minus_alpha_bar)
        )
        return image * original_samples + deviation * noise

    def __len__(self) -> int:
        return len(self.config["betas"])


def _at(table: Tensor, index: int, like: Tensor) -> Tensor:
    """An entry of a table, to be multiplied with images."""
    return table[index].to(like.device).view(1, 1, 1, 1)
