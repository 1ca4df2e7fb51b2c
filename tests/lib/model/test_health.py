"""An adapter that is dead in any way is told from one that is alive, and named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from stages.lib.data.bins import Schedule
from stages.lib.model import adapter, health, history, training
from stages.lib.model.loss import lay_out
from stages.lib.model.quick import Quick
from stages.lib.run.exits import GateFailed
from tests.decoders import PLAIN, QUICK, make
from tests.lib.model.conftest import MemoryRows
from tests.lib.model.test_training import RECIPE, log, run

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = np.arange(3, 43)
LAST_V = "model.layers.1.self_attn.v_proj"
MODULES = [f"model.layers.{n}.self_attn.{kind}_proj" for n in (0, 1) for kind in "qv"]


def projection(tuned: Any, name: str = LAST_V) -> Any:
    return tuned.get_submodule(f"base_model.model.{name}")


def spread(tuned: Any) -> Any:
    """An adapter as training leaves it: no B is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.copy_(0.01 * torch.randn(p.shape, generator=generator))
    return tuned


def saved(tuned: Any, folder: Path, change: Callable[[dict[str, Any]], object] = len) -> Path:
    """The folder of an adapter, its tensors changed behind the model's back."""
    adapter.save(tuned, folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def of(tensors: dict[str, torch.Tensor], factor: str, module: str = LAST_V) -> torch.Tensor:
    return tensors[f"base_model.model.{module}.lora_{factor}.weight"]


# ---- the first gradients


@pytest.mark.parametrize("precision", ["fp32", "nf4", "fp8"])
def test_a_healthy_run_is_said_to_be_so(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path, precision: str
) -> None:
    tuned, kept = attach(precision, dropout=0.1), list[Path]()
    run(
        tuned, some_rows(*range(8, 28)), 40, 2, tmp_path, precision=precision,
        saved=lambda folder, *_: kept.append(folder),
    )  # fmt: skip
    first = history.first_gradients(kept[-1])
    assert first is not None
    assert (first["step"], first["modules"], first["without_input"]) == (1, 4, [])
    assert first["least"] > 0
    assert first["least_in"] in MODULES
    assert all(history.first_gradients(folder) == first for folder in kept)
    adapter.assemble(kept[0], kept[-1], tmp_path / "out")
    found = health.trained(tuned, tmp_path / "out", IDS, precision, first)
    assert found["first_gradients"] == first
    assert found["unmoved"] == []
    assert found["logit_change"] > 0
    assert sorted(found["b_norms"]) == MODULES
    best = load_file(kept[0] / "adapter_model.safetensors")
    for name, norm in found["b_norms"].items():
        assert norm == pytest.approx(float(of(best, "B", name).norm()), rel=1e-5)
    health.check_same(tuned, best)  # the one that is published is left in memory
    with pytest.raises(GateFailed, match="not what it is in memory"):
        health.check_same(tuned, load_file(kept[-1] / "adapter_model.safetensors"))


def freeze(tuned: Any) -> None:
    projection(tuned).requires_grad_(False)


def detach(tuned: Any) -> None:
    projection(tuned).register_forward_hook(lambda module, inputs, output: output.detach())


def detach_all(tuned: Any) -> None:
    for name in MODULES:
        projection(tuned, name).register_forward_hook(lambda module, inputs, y: y.detach())


LAST = rf"1 of 4 adapted modules \({LAST_V}\)"


@pytest.mark.parametrize(
    ("spoil", "plain", "named"),
    [
        (freeze, False, LAST), (freeze, True, LAST), (detach, False, LAST), (detach, True, LAST),
        (detach_all, False, r"4 of 4 adapted modules \(.*, .*, .* and 1 more\)"),
    ],
)  # fmt: skip
def test_a_projection_without_a_gradient_ends_the_run_at_its_first_step(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path, spoil: Any, plain: bool,
    named: str,
) -> None:  # fmt: skip
    tuned, bins, kept = attach(), 0, list[Path]()
    if plain:
        tuned.config.attention_dropout = 0.1  # it is not known then

    def count(*_: object) -> None:
        nonlocal bins
        bins += tuned.training

    tuned.register_forward_hook(count)
    spoil(tuned)
    with pytest.raises(GateFailed, match="^" + named + " had no gradient at step 1 .*LORA_TARGETS"):
        run(
            tuned, some_rows(*range(8, 28)), 40, 1, tmp_path, steps=8,
            saved=lambda folder, *_: kept.append(folder),
        )  # fmt: skip
    assert bins == 2  # the first step is read behind the second
    assert not kept


class Routed(torch.nn.Module):
    """An MLP beside which lie an expert that no token is sent to, and one that gets some that teach nothing."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.mlp = mlp
        self.idle, self.partial = (torch.nn.Linear(64, 64, bias=False) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mlp(x)
        unlearned = 0 * self.partial(x[:, :3])
        return y + torch.nn.functional.pad(unlearned, (0, 0, 0, y.shape[1] - 3))


def test_a_module_that_had_no_input_may_do_without_a_gradient(
    tiny: Path, some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    from stages.lib.model import load
    from stages.lib.model.base import Base

    base = Base(str(tiny), None)
    base.fetch()
    model = load.load(base, "fp32")
    model.config.attention_dropout = 0.1
    model.model.layers[0].mlp = Routed(model.model.layers[0].mlp)
    tuned = adapter.attach(model, base, 4, 8, 0.0, ("q_proj", "v_proj", "idle", "partial"), seed=0)
    last: list[Path] = []
    run(tuned, some_rows(*range(8, 28)), 40, 2, tmp_path, saved=lambda f, *_: last.append(f))
    first = history.first_gradients(last[-1])
    assert first is not None
    experts = ["model.layers.0.mlp.idle", "model.layers.0.mlp.partial"]
    assert sorted(first["without_input"]) == experts
    assert health.check(tuned, last[-1], IDS, "fp32", first)["unmoved"] == experts
    with pytest.raises(GateFailed, match=r"2 of 6 .* are zero, though they had input"):
        health.check(tuned, last[-1], IDS, "fp32", first | {"without_input": []})


def row(length: int, learned: bool = True) -> Any:
    return np.arange(5, 5 + length), np.full(length, learned)


def test_a_step_from_which_not_all_can_learn_is_passed_over(
    attach: Callable[..., Any], tmp_path: Path
) -> None:
    """Behind one token there is nothing to choose from, so query and key have no gradient."""
    rows = MemoryRows([row(2)] * 12 + [row(20, learned=False)] * 3 + [row(20)])
    plan = Schedule(rows.lengths, 20, 1, 1, None, 0)
    tellers = [n for n in range(plan.total_bins) if 15 in plan.rows(n)]
    assert tellers[0] > 0
    last: list[Path] = []
    quick = Quick(attach(), "fp32")
    quick.arrange(0)
    training.train(
        quick, plan, rows, MemoryRows([]), quick.shape(rows.lengths, 20), tmp_path, RECIPE,
        resume=None, saved=lambda folder, *_: last.append(folder),
    )  # fmt: skip
    noted = [entry["step"] for entry in log(last[-1]) if "first_gradients" in entry]
    assert noted == [tellers[0] + 1]

    rows = MemoryRows([row(2)] * 8)
    tuned = attach()
    run(tuned, rows, 4, 1, tmp_path / "short", saved=lambda folder, *_: last.append(folder))
    assert history.first_gradients(last[-1]) is None
    found = health.check(tuned, last[-1], IDS, "fp32", None)
    assert found["unmoved"] == [name for name in MODULES if "q_proj" in name]


def test_a_step_with_nothing_left_to_learn_is_passed_over(attach: Callable[..., Any]) -> None:
    tuned = attach()
    first = health.FirstGradients(tuned, True, None)
    batch = lay_out([row(20)])
    first.look(batch | {"slot": 0, "tells": health.tells(batch)})
    for p in adapter.trainable(tuned):
        p.grad = torch.zeros_like(p)
    norms = first.norms()
    assert norms is not None
    assert norms.tolist() == [0.0] * 8
    assert first.norms() is None  # once is enough, until it is known to have told nothing
    assert first.judge(1, 0.0, norms.tolist()) == {}
    for p in adapter.trainable(tuned):
        p.grad = torch.ones_like(p)
    again = first.norms()
    assert again is not None
    assert first.judge(2, 0.1, again.tolist())["first_gradients"]["step"] == 2
    assert first.norms() is None


def test_the_record_outlives_a_stop_and_is_not_made_again(
    attach: Callable[..., Any], some_rows: Callable[..., Any], tmp_path: Path
) -> None:
    rows, kept = some_rows(*range(8, 28)), dict[str, Path]()
    run(
        attach(), rows, 40, 3, tmp_path / "cut", steps=6, saved=lambda f, *_: kept.update({f.name: f})
    )  # fmt: skip
    first = history.first_gradients(kept["checkpoint-3"])
    tuned, on = attach(), list[Path]()
    run(
        tuned, rows, 40, 3, tmp_path / "on", steps=6, resume=kept["checkpoint-3"],
        saved=lambda folder, *_: on.append(folder),
    )  # fmt: skip
    noted = [entry for entry in log(on[-1]) if "first_gradients" in entry]
    assert [entry["step"] for entry in noted] == [1]
    assert noted[0]["first_gradients"] == first

    # Stopped behind its last step, before anything was published: the adapter is in memory all the same.
    fresh = attach()
    assert run(fresh, rows, 40, 3, tmp_path / "end", steps=6, resume=on[-1])
    health.check_same(fresh, load_file(on[-1] / "adapter_model.safetensors"))


# ---- the adapter and its file


def test_what_is_not_finite_is_named(attach: Callable[..., Any], tmp_path: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        of(tensors, "A")[1, 2] = torch.nan

    folder = saved(spread(attach()), tmp_path, spoil)
    with pytest.raises(GateFailed, match=rf"not finite, base_model.model.{LAST_V}.lora_A.weight;"):
        health.check(attach(), folder, IDS, "fp32")


def test_a_bit_between_file_and_memory_is_seen(attach: Callable[..., Any], tmp_path: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        of(tensors, "B").view(torch.int32)[3, 1] ^= 1

    tuned = spread(attach())
    assert health.check(tuned, saved(tuned, tmp_path / "same"), IDS, "fp32")["logit_change"] > 0
    with pytest.raises(GateFailed, match=rf"{LAST_V}.lora_B.weight in its file is not what it is"):
        health.check(tuned, saved(tuned, tmp_path / "bit", flip), IDS, "fp32")
    with pytest.raises(GateFailed, match=rf"{LAST_V}.lora_B.weight in its file is not what it is"):
        health.check(
            tuned, saved(tuned, tmp_path / "less", lambda tensors: tensors.popitem()), IDS, "fp32"
        )


def test_an_adapter_that_was_never_trained_changes_nothing(
    attach: Callable[..., Any], tmp_path: Path
) -> None:
    tuned = attach()
    with pytest.raises(GateFailed, match="changes nothing: no B matrix has moved from zero"):
        health.check(tuned, saved(tuned, tmp_path / "fresh"), IDS, "fp32")
    tuned = spread(attach())
    with torch.no_grad():
        for name, p in tuned.named_parameters():
            if "lora_A" in name:
                p.zero_()
    with pytest.raises(GateFailed, match=r"switching the adapter on changes nothing.* 40 tokens"):
        health.check(tuned, saved(tuned, tmp_path / "cut off"), IDS, "fp32")


@pytest.mark.parametrize("family", ["llama3", "gemma3", "phi3", "gpt2", "gemma2"])
@pytest.mark.parametrize("made_quick", [False, True])
def test_the_change_is_that_of_the_models_own_logits(family: str, made_quick: bool) -> None:
    tuned = make(QUICK[family] if family in QUICK else PLAIN[family][0]).eval()
    ids = torch.from_numpy(IDS)[None]
    with torch.no_grad():
        on = tuned(input_ids=ids).logits
        with tuned.disable_adapter():
            wanted = float((on - tuned(input_ids=ids).logits).abs().max())
    if made_quick:
        Quick(tuned, "fp32").arrange(0)
    assert health.logit_change(tuned, IDS, "fp32") == pytest.approx(wanted, rel=1e-4)
    assert not tuned.training
    assert not tuned.get_base_model()._forward_hooks


def test_nothing_is_compiled_for_it() -> None:
    tuned = make(QUICK["llama3"])
    quick = Quick(tuned, "fp32")
    counter = CompileCounter()
    quick.compiles, quick.backend = True, counter
    quick.arrange(1)
    assert health.logit_change(tuned, IDS, "fp32") > 0
    assert tuned.training
    assert counter.frame_count == 0
