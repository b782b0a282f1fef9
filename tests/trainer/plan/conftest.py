"""Fixtures of the plan's tests."""

import pytest
import torch
from torch.nn import functional as F


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed replaces it for the rest of a process, once a test there has trained at stage 3."""
    monkeypatch.setattr(F, "linear", torch._C._nn.linear)  # pyright: ignore[reportAttributeAccessIssue]
