"""Class labels: a vector for each class, and one for "no label"."""

from jaxtyping import Float
from torch import Tensor, nn

from models.shapes import Label


class LabelEmbedding(nn.Module):
    """Row `num_classes` stands for a label that was dropped.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        width: length of each vector.
        deviation: standard deviation of its initial values.
    """

    def __init__(self, num_classes: int, width: int, *, deviation: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding.weight, std=deviation)

    def forward(self, label: Label | None) -> Float[Tensor, "b width"]:
        """The vector of each label.

        Raises:
            ValueError: a network with classes was given no labels.
        """
        if label is None:
            raise ValueError("this network has classes and was given no labels: pass num_classes for `no label`")
        return self.embedding(label)
