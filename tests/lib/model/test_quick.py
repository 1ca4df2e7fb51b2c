"""The quick path against plain PEFT on the same weights, for every family of decoders."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from stages.lib.model import adapter, load
from stages.lib.model.loss import QUICK_INPUTS, lay_out
from stages.lib.model.quick import Quick
from tests.decoders import (
    PLAIN,
    QUICK,
    error,
    exact_twin,
    gradients,
    make,
    plain_sum,
    quick_sum,
    some,
    ten_steps,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 3e-6  # relative, in fp32: 0.9e-6 was seen against plain fp32, 1.8e-6 against fp64
CHUNKED = {
    "model_type": "llama4_text", "attention_chunk_size": 8, "num_local_experts": 1, "head_dim": 16,
    "interleave_moe_layer_step": 9, "intermediate_size_mlp": 176, "no_rope_layers": [1, 1],
}  # fmt: skip
FAMILIES = pytest.mark.parametrize("family", QUICK)


@FAMILIES
def test_loss_and_gradients_are_those_of_plain_peft(family: str) -> None:
    rows = some(40, 23, 5)
    exact = make(QUICK[family], dtype=torch.float64)
    wanted = plain_sum(exact, rows)
    of_exact = gradients(exact, wanted)
    tuned = make(QUICK[family])
    plain = plain_sum(tuned, rows)
    of_plain = gradients(tuned, plain)
    quick = Quick(tuned, "fp32")
    quick.arrange(False)
    assert not quick.remarks
    found = quick_sum(quick, rows, 128)
    of_found = gradients(tuned, found)
    assert error(found, plain) < CLOSE
    assert error(of_found, of_plain) < CLOSE
    assert error(found, wanted) < CLOSE
    assert error(of_found, of_exact) < CLOSE


@FAMILIES
def test_packed_rows_are_rows_one_by_one(family: str) -> None:
    rows = some(23, 40, 1, 5, 17)
    tuned = make(QUICK[family])
    quick = Quick(tuned, "fp32")
    quick.arrange(False)
    together = quick_sum(quick, rows, 128)
    of_together = gradients(tuned, together)
    alone = torch.stack([quick_sum(quick, [row], 128) for row in rows]).sum()
    assert error(together, alone) < CLOSE
    assert error(of_together, gradients(tuned, alone)) < CLOSE


@FAMILIES
def test_recompute_gives_the_same_numbers(family: str) -> None:
    found = []
    for again in (False, True):
        tuned = make(QUICK[family], dropout=0.2)
        quick = Quick(tuned, "fp32")
        quick.arrange(again)
        quick.seed.fill_(12345)
        loss = quick_sum(quick, some(40, 23, 5), 128)
        found.append((loss, gradients(tuned, loss)))
    (kept, of_kept), (again, of_again) = found
    quick.seed.fill_(12346)
    assert error(quick_sum(quick, some(40, 23, 5), 128), kept) > 1e-6, "dropout is off"
    assert torch.equal(again, kept)
    for name, gradient in of_kept.items():
        assert torch.equal(of_again[name], gradient), name


@FAMILIES
def test_bf16_is_as_close_to_exact_as_plain_peft_is(family: str) -> None:
    """Under autocast, some layers hand on fp32: nothing may trip over it."""
    rows = some(40, 23, 5)
    tuned = make(QUICK[family], dtype=torch.bfloat16)
    exact = exact_twin(tuned, QUICK[family])
    wanted = plain_sum(exact, rows)
    of_exact = gradients(exact, wanted)
    with load.compute("bf16"):
        plain = plain_sum(tuned, rows)
    of_plain = gradients(tuned, plain)
    quick = Quick(tuned, "bf16")
    quick.arrange(False)
    assert not quick.remarks
    with load.compute("bf16"):
        found = quick_sum(quick, rows, 128)
    of_found = gradients(tuned, found)
    assert error(found, wanted) < 1.5 * error(plain, wanted) + 1e-5
    assert error(of_found, of_exact) < 1.2 * error(of_plain, of_exact)


@pytest.mark.parametrize("family", PLAIN)
def test_what_is_not_known_stays_plain_and_says_so(family: str) -> None:
    described, remark = PLAIN[family]
    rows = some(40, 23, 5)
    tuned = make(described)
    plain = plain_sum(tuned, rows)
    of_plain = gradients(tuned, plain)
    quick = Quick(tuned, "fp32")
    assert len(quick.remarks) == 1
    assert remark in quick.remarks[0]
    assert quick.shape(np.array([40]), 128) is None
    quick.arrange(True)
    alone = torch.stack([quick_sum(quick, [row], 128) for row in rows]).sum()
    assert error(alone, plain) < CLOSE
    assert error(gradients(tuned, alone), of_plain) < CLOSE


def test_attention_that_is_not_the_plain_one_is_noticed() -> None:
    """Llama 4 keeps its chunks in its mask alone; here it says that it is Llama."""
    tuned = make(CHUNKED)
    tuned.config.model_type = "llama"
    rows = some(40, 23)
    plain = plain_sum(tuned, rows)
    quick = Quick(tuned, "fp32")
    assert "nats off" in quick.remarks[0]
    assert torch.equal(plain_sum(tuned, rows), plain)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen3", "phi3"])
def test_ten_optimizer_steps_are_those_of_plain_peft(family: str) -> None:
    """Relative error of the way that the adapter went, against plain PEFT in fp64."""
    bins = [some(40, 23, 5, seed=number) for number in range(10)]
    exact = make(QUICK[family], dtype=torch.float64)
    wanted = ten_steps(exact, lambda number: plain_sum(exact, bins[number]) / 45)
    tuned = make(QUICK[family])
    quick = Quick(tuned, "fp32")
    quick.arrange(False)
    found = ten_steps(tuned, lambda number: quick_sum(quick, bins[number], 128) / 45)
    assert error(found, wanted) < 2e-5  # 6.3e-6 was seen, of plain fp32, too


@pytest.mark.parametrize("family", ["llama3", "qwen2", "phi3"])
def test_an_adapter_trained_quick_loads_in_plain_peft(family: str, tmp_path: Path) -> None:
    tuned = make(QUICK[family], dropout=0.1)
    quick = Quick(tuned, "fp32")
    quick.arrange(True)
    ten_steps(tuned, lambda number: quick_sum(quick, some(40, 5, seed=number), 128) / 45)
    adapter.save(tuned, tmp_path)
    base = make(QUICK[family]).unload()
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    for name, p in loaded.state_dict().items():
        if "lora_" in name:
            assert torch.equal(p, tuned.state_dict()[name]), name
    tuned.eval()
    (ids, mask) = some(40)[0]
    batch = lay_out([(ids, mask)], quick.shape(np.array([40]), 40))
    causal = quick.causal
    given = {n: batch[n] for n in QUICK_INPUTS if n not in ("kept", "targets")}
    with torch.no_grad():
        hidden = causal.model(use_cache=False, **given).last_hidden_state
        logits = causal.get_output_embeddings()(hidden)
        wanted = loaded(input_ids=batch["input_ids"]).logits
        with loaded.disable_adapter():
            assert error(loaded(input_ids=batch["input_ids"]).logits, wanted) > 0.01
    assert error(logits, wanted) < CLOSE


def test_a_switched_off_adapter_leaves_the_base() -> None:
    tuned = make(QUICK["llama3"])
    rows = some(40, 23)
    with tuned.disable_adapter():
        plain = plain_sum(tuned, rows)
    quick = Quick(tuned, "fp32")
    assert error(quick_sum(quick, rows, 128), plain) > 1e-3
    with tuned.disable_adapter():
        assert error(quick_sum(quick, rows, 128), plain) < CLOSE


@pytest.mark.parametrize("kind", ["attention dropout", "dora", "bias"])
def test_what_the_quick_path_does_not_know_is_computed_all_the_same(kind: str) -> None:
    """In training, for the comparison of a new model is of its evaluation, before a step moved B."""
    changed = {"attention_dropout": 0.5} if kind == "attention dropout" else {}
    lora = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(kind, {})
    described = QUICK["qwen2"] | {"num_hidden_layers": 1}
    tuned = make(described, **changed, lora=lora, targets=["q_proj", "v_proj"])
    rows = some(40)
    torch.manual_seed(1)
    plain = plain_sum(tuned, rows)
    torch.manual_seed(1)
    of_plain = gradients(tuned, plain)
    quick = Quick(tuned, "fp32")
    torch.manual_seed(1)
    found = quick_sum(quick, rows, 40)
    torch.manual_seed(1)
    of_found = gradients(tuned, found)
    assert error(found, plain) < CLOSE
    assert error(of_found, of_plain) < CLOSE
    assert any(kind in remark for remark in quick.remarks)
