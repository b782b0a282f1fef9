import jaxtyping
import pytest
import torch

from models.diffusion import Diffusion, DiffusionConfig, posterior_mean


def test_shapes_and_types_are_checked_at_run_time() -> None:
    diffusion = Diffusion.from_config(DiffusionConfig())
    image = torch.zeros(2, 3, 4, 4)
    t = torch.zeros(2, dtype=torch.int64)
    posterior_mean(diffusion, image, image, t)
    with pytest.raises(jaxtyping.TypeCheckError):
        posterior_mean(diffusion, image, torch.zeros(2, 3, 8, 8), t)
    with pytest.raises(jaxtyping.TypeCheckError):
        posterior_mean(diffusion, image, image, t.float())  # pyright: ignore[reportArgumentType]
