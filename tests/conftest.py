"""Fixtures of several test files."""

import pytest
import torch
from hypothesis import settings

# An example takes as long as the machine needs.
settings.register_profile("any_pace", settings.default, deadline=None)
settings.load_profile("any_pace")


@pytest.fixture
def one_thread():
    """Tiny matrices: a second thread would only wait, for long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
