"""A tuned model made quick for training: fast where that is known to compute the same, plain elsewhere."""

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint

from stages.lib.model import (
    attention,
    carrying,
    compiling,
    cross_entropy,
    flash,
    int8,
    load,
    lora,
    nf4,
    projections,
    selective,
    sharding,
)
from stages.lib.model.loss import Row, Shape, lay_out, nll_sum, to
from stages.lib.model.offload import Offload
from stages.lib.run.exits import CannotRun

# Decoders whose attention is a causal softmax and nothing beyond it, and whose layers have Llama's names.
KNOWN = {
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi", "phi3", "smollm3", "olmo2", "granite",
}  # fmt: skip
PROBE = (40, 24)  # tokens of the rows on which quick and plain are compared
# Of the mean loss in nats, in fp32 and in bf16: a wrong mask or a missing factor is far off.
CLOSE = {True: 1e-3, False: 2e-2}
LOUD = 1000.0


class Quick:
    """How a tuned model was made quick.

    Args:
        tuned: with its adapter attached. precision: of its base.
        unpacked: dequantise NF4 once, not at every product. sharded: by `sharding.spread`.

    Attributes:
        remarks: what is not as usual, and why; a sentence each.
        seed: of the adapter's dropout, int32 scalar on the device, to be set for each bin.
        recomputed, offloaded: layers, as they were arranged.
    """

    def __init__(
        self, tuned: Any, precision: str, unpacked: bool = False, sharded: bool = False
    ) -> None:
        self.tuned, self.precision, self.unpacked = tuned, precision, unpacked
        self.remarks: list[str] = []
        self.recomputed = self.offloaded = 0
        self.causal = tuned.get_base_model()
        self.seed = torch.zeros((), dtype=torch.int32, device=self.causal.device)
        why = self._obstacle() or self._pack()
        if why and sharded:
            raise CannotRun(f"{why}, and a sharded base has to be one; set SHARDING=none")
        if why:
            self.remarks.append(f"{why}: it is computed as transformers and peft have it")
        self.packed = not why
        self.compiles = self.packed and load.device().type == "cuda"
        self.backend = "inductor"
        self.layers: list[tuple[Any, Any]] = []
        self.traffic: Offload | None = None
        if self.packed:
            _let_gradients_in(self.causal)
            lora.lighten(tuned, self.seed)
            if precision == "fp8":
                if not sharded:
                    projections.gather(self.causal)
                projections.fuse(self.causal)
            elif sharded:
                pass  # as it was made before it was cut
            elif precision == "nf4":
                (nf4.unpack if unpacked else nf4.lighten)(self.causal)
            elif precision == "int8":
                int8.lighten(self.causal)
            self.layers = [(layer, layer.forward) for layer in self.causal.model.layers]

    def shape(self, lengths: Any, tokens: int) -> Shape | None:
        """How bins of `tokens` with rows of these lengths [rows] are laid out."""
        if not self.packed:
            return None
        found = Shape.of(lengths, tokens)
        return found if self.compiles else Shape(found.longest)

    def hidden(self, batch: dict[str, Any]) -> torch.Tensor:
        """The last hidden states of a bin, [N, width], of which the head makes the logits of its targets."""
        options = {name: batch[name] for name in ("position_ids", "bounds", "longest", "uniform")}
        return _hidden(self.causal, batch["input_ids"], batch["kept"], options)

    def _obstacle(self) -> str | None:
        """What about the model or its adapter is not known here, if anything."""
        config = self.causal.config
        kind = config.model_type
        if kind not in KNOWN:
            return f"{kind} is not a decoder known here"
        # Neither of these would show in the comparison: it evaluates, and a new adapter adds nothing yet.
        if getattr(config, "attention_dropout", 0.0):
            return f"{kind} has attention dropout"
        if not lora.simple(self.tuned):
            return "the adapter has dora or a bias"
        with self._at_rest():
            if not _head_is_all(self.causal, to(lay_out(_probe()), self.causal.device)):
                return f"the head of {kind} is more than a product"
        return None

    def _pack(self) -> str | None:
        """Switch to packed attention and a loss without logits; or say why not, and switch nothing."""
        causal, place = self.causal, self.causal.device
        before, original = causal.config._attn_implementation, causal.forward
        piece = cross_entropy.piece
        if place.type == "cuda":
            piece = compiling.tried(piece, "the loss", dynamic=True)
        with self._at_rest():
            plain = nll_sum(causal, to(lay_out(_probe()), place))
            attention.register()
            causal.config._attn_implementation = attention.NAME
            causal.forward = types.MethodType(functools.partial(_forward, original, piece), causal)
            self.remarks += self._flash()
            quick = nll_sum(causal, to(lay_out(_probe(), Shape(max(PROBE))), place))
        off = abs(float(quick - plain)) / (sum(PROBE) - len(PROBE))
        if off <= CLOSE[self.precision == "fp32"]:
            return None
        causal.config._attn_implementation, causal.forward = before, original
        return f"packed attention is {off:.2g} nats off for {causal.config.model_type}"

    def _flash(self) -> list[str]:
        """Have attention computed by FlashAttention 3 or 4, where that can be; and what is to be said."""
        config, place = self.causal.config, self.causal.device
        if place.type != "cuda" or self.precision == "fp32":
            return []
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        window = getattr(config, "sliding_window", None)
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            found = flash.adopt(heads, config.num_key_value_heads, width, window, place)
        return [found] if found else []

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        """Evaluating, without gradients; in int8 so that a row does not depend on those beside it."""
        was_training = self.tuned.training
        self.tuned.eval()
        alone = int8.without_outliers if self.precision == "int8" else contextlib.nullcontext
        with torch.no_grad(), load.compute(self.precision), alone(self.tuned):
            yield
        self.tuned.train(was_training)

    def arrange(self, recomputed: int, offloaded: int = 0, lean: int = 0) -> None:
        """Compile the layers, where that pays, and say what they keep.

        Args:
            recomputed: the first layers, so many, keep their input alone. offloaded: or they keep it, and what
                attention read and wrote, on the host. lean: of those so many keep not what attention read.
        """
        self.recomputed, self.offloaded = recomputed, offloaded
        if not self.packed:
            if recomputed or offloaded:
                load.recompute(self.tuned)
            return
        away = [layer for layer, _ in self.layers[:offloaded]]
        self.traffic = Offload(away, self.causal.device) if away else None
        for place, (layer, plain) in enumerate(self.layers):
            step = self._compiled(plain)
            layer.forward = step
            full = place < offloaded and not carrying.is_lean(place, offloaded, lean)
            layer.self_attn.held = full and self.compiles
            if self.traffic and place < offloaded:
                again = (
                    selective.step(plain, self.backend) if self.compiles else _checkpointed(step)
                )
                layer.forward = functools.partial(
                    _offloaded, layer, step, again, self.traffic, place
                )
            elif place < recomputed:
                layer.forward = functools.partial(_again, layer, step)

    def _compiled(self, plain: Any) -> Any:
        if not self.compiles:
            return plain
        return compiling.compiled(plain, self.backend, fullgraph=True, dynamic=False)


def _probe() -> list[Row]:
    return [(np.arange(3, 3 + n, dtype=np.int64), np.ones(n, bool)) for n in PROBE]


def _checkpointed(step: Any) -> Any:
    return functools.partial(torch.utils.checkpoint.checkpoint, step, use_reentrant=False)


def _again(layer: Any, step: Any, hidden: torch.Tensor, **options: Any) -> Any:
    if not (layer.training and torch.is_grad_enabled()):
        return step(hidden, **options)
    return _checkpointed(step)(hidden, **options)


def _offloaded(
    layer: Any, step: Any, again: Any, traffic: Offload, place: int, hidden: torch.Tensor, **options: Any
) -> Any:  # fmt: skip
    if not (layer.training and torch.is_grad_enabled()):
        return step(hidden, **options)
    with traffic.around(place, options):
        return again(hidden, **options)


def _forward(
    original: Any, piece: Any, causal: Any, input_ids: torch.Tensor | None = None,
    kept: torch.Tensor | None = None, targets: torch.Tensor | None = None, **options: Any,
) -> Any:  # fmt: skip
    """The summed loss of a bin that was laid out with a shape; anything else goes the model's own way."""
    if targets is None:
        return original(input_ids=input_ids, **options)
    hidden = _hidden(causal, input_ids, kept, options)
    with sharding.head(causal) as (weight, bias):
        return cross_entropy.NllSum.apply(hidden, weight, bias, targets, piece)


def _hidden(causal: Any, input_ids: Any, kept: Any, options: dict[str, Any]) -> torch.Tensor:
    """The last hidden states at the `kept` positions, [N, width]."""
    if options["bounds"].is_cuda:
        torch._dynamo.mark_dynamic(options["bounds"], 0)
    hidden = causal.model(input_ids=input_ids, use_cache=False, **options).last_hidden_state[0]
    return hidden.index_select(0, kept)


def _head_is_all(causal: Any, batch: dict[str, Any]) -> bool:
    """Whether logits are the head of the last hidden state: no scale, no cap, nothing between."""
    head = causal.get_output_embeddings()
    if sharding.kind(head) is not torch.nn.Linear or not hasattr(causal, "model"):
        return False
    seen: list[torch.Tensor] = []

    def louder(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        seen[:] = [inputs[0], output * LOUD]
        return seen[1]

    hook = head.register_forward_hook(louder)
    ids, positions = batch["input_ids"], batch["position_ids"]
    logits = causal(input_ids=ids, position_ids=positions, use_cache=False).logits
    hook.remove()
    inner = causal.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
    return torch.equal(logits, seen[1]) and torch.equal(inner, seen[0])


def _let_gradients_in(causal: Any) -> None:
    """Let the first layer have a gradient to hand back, as all others do: so one graph serves them all."""

    def ask(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled():
            output.requires_grad_(True)

    causal.get_input_embeddings().register_forward_hook(ask)
