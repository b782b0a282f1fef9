"""Shapes and dtypes of the models' inputs and outputs; the tests check them at run time.

`t` is 0 .. T-1, and t = 0 is step 1 of the paper.
"""

from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Image = Float[Tensor, "b c h w"]
"""Pixels in [-1, 1], with or without noise."""
Features = Float[Tensor, "b c h w"]
"""Feature maps of a network, of any range."""
HalfFeatures = Float[Tensor, "b c h//2 w//2"]
DoubleFeatures = Float[Tensor, "b c 2*h 2*w"]
Uint8Image = UInt8[Tensor, "b c h w"]
Timestep = Int64[Tensor, " b"]
Label = Int64[Tensor, " b"]
Latent = Float[Tensor, "b nz"]
Embedding = Float[Tensor, "b time"]
Style = Float[Tensor, "b style"]
Logits = Float[Tensor, " b"]
