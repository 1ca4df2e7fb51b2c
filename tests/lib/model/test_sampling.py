"""What is drawn is what may be drawn."""

import torch

from stages.lib.model.sampling import Sampling, choose


def test_no_noise_is_infinite() -> None:
    """A word in 16 million had it, so one of 300 tokens was any word of the vocabulary."""
    scores = torch.randn(1, 49152, generator=torch.manual_seed(0)).expand(400, -1)
    prompts = torch.zeros(400, dtype=torch.int32)
    places = torch.arange(400, dtype=torch.int32)
    found = choose(scores, Sampling(2.0, top_k=1), prompts, places)
    assert (found == scores[0].argmax()).all()
