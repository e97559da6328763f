"""The tests of the examples on two ranks, as `torchrun -m pytest` runs them."""

from __future__ import annotations

import pytest

from tests.dist.launch import torchrun

pytestmark = pytest.mark.slow


def test_they_pass_under_torchrun():
    printed = torchrun(2, "pytest", "-p", "no:cacheprovider", "tests/custom_models")
    assert printed.count(" passed") == 2 and " failed" not in printed
