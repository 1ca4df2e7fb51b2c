"""What training is held against; a GPU's own rate is measured in tests/gpu."""

import pytest
import torch

from stages.lib.model import ceiling


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_a_cpu_has_no_ceiling() -> None:
    assert ceiling.highest("bf16") is None


def test_a_share_is_known_where_both_rates_are() -> None:
    assert ceiling.share(3e14, 8e14) == 0.375
    assert ceiling.share(None, 8e14) is None
    assert ceiling.share(3e14, None) is None
