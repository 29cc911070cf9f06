"""Every test of this folder draws the same random numbers on every run."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Seed torch's generator."""
    torch.manual_seed(0)
