"""Shapes and dtypes of the models' inputs and outputs; the tests check types at run time.

`t` is 0 .. T-1, and t = 0 is step 1 of the paper.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Image = Float[Tensor, "b c h w"]
"""Pixels in [-1, 1], with or without noise."""
Condition = Float[Tensor, "b c_given h w"]
"""The image that is given with each image, pixels in [-1, 1]."""
Features = Float[Tensor, "b c h w"]
"""Feature maps of a network, of any range."""
HalfFeatures = Float[Tensor, "b c h//2 w//2"]
DoubleFeatures = Float[Tensor, "b c 2*h 2*w"]
Uint8Image = UInt8[Tensor, "b c h w"]
Timestep = Int64[Tensor, " b"]
NoiseLevel = Float[Tensor, " b"]
"""Sigma: standard deviation of the noise divided by the factor of the image."""
Label = Int64[Tensor, " b"]
Latent = Float[Tensor, "b nz"]
Embedding = Float[Tensor, "b time"]
Style = Float[Tensor, "b style"]
Logits = Float[Tensor, " b"]
Predictions = tuple[Image, ...]
"""What a discriminator predicts: x0 before x_t."""


@dataclass(frozen=True)
class ImageForm:
    """What all images of a data set have in common.

    Attributes:
        size: height and width in pixels.
        channels: 1 grey, 3 RGB, or another number; 2 at size 1 for points in the plane.
        num_classes: number of labels; 0: without labels.
        condition_channels: channels of the image that is given with each image; 0: none is.
    """

    size: int
    channels: int
    num_classes: int = 0
    condition_channels: int = 0

    @property
    def is_point(self) -> bool:
        """Whether an image is a point in the plane: one pixel of two channels."""
        return (self.size, self.channels) == (1, 2)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of an image: channels, height, width."""
        return self.channels, self.size, self.size
