"""A Llama-like decoder as a function of its weights, for answers: a cache of keys and values, and no gradients.

transformers' modules hold the weights; peft's hold the adapter's. Projections of one input lie one under the
other in memory, with the adapter's first factors below them, and are one product.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer

from stages.lib.model import attention, decode_ops, load, lora
from stages.lib.model.decode_ops import Heads
from stages.lib.model.groups import Group, Unknown, has_room_unpacked, product

# Decoders whose layers are two RMS norms, rotated attention and a SwiGLU, and nothing beyond them.
KNOWN = {"llama", "mistral", "qwen2", "qwen3"}
ROPE = {"default", "linear", "llama3", "yarn"}  # whose angles do not depend on the length of a text
PROBED = 4096  # positions whose angles are there from the start
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


class Layer(NamedTuple):
    """A layer's weights: of its norms, [width], and of its projections."""

    first_norm: torch.Tensor
    qkv: Group
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    o: Group
    second_norm: torch.Tensor
    wide: Group
    down: Group


class Decoder:
    """A tuned model's weights, and what it computes.

    Args:
        tuned: with its adapter. precision: of its base.

    Attributes:
        heads: see `Heads`. window: tokens that one sees, itself among them, or None for all.
        strength: of the adapter, fp32 [1], see `decode_ops`.

    Raises:
        Unknown: it is no decoder of the kind that this is written for.
    """

    def __init__(self, tuned: Any, precision: str) -> None:
        causal = tuned.get_base_model()
        config = causal.config
        self.scale = _check(tuned, causal)
        self.dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self.place, self.words = causal.device, config.vocab_size
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.heads: Heads = (config.num_attention_heads, config.num_key_value_heads, head)
        self.window = _window(config)
        self.eps = float(config.rms_norm_eps)
        self.wide = int(config.intermediate_size)
        unpack = precision == "nf4" and has_room_unpacked(causal)
        self.layers = [_layer(layer, self.dtype, unpack) for layer in causal.model.layers]
        self.norm = causal.model.norm.weight.detach()
        self.embeddings = causal.get_input_embeddings().weight.detach()
        self.head = causal.get_output_embeddings().weight.detach()
        self.strength = torch.ones(1, device=self.place)
        self.rotary = causal.model.rotary_emb
        self.turns = self._turns(PROBED)
        self.precision = precision

    def _turns(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(count, device=self.place)[None]
        like = torch.empty(1, dtype=self.dtype, device=self.place)
        cos, sin = self.rotary(like, positions)
        return cos[0].contiguous(), sin[0].contiguous()

    def reach(self, positions: int) -> None:
        """Be ready for texts of so many tokens."""
        if positions > len(self.turns[0]):
            self.turns = self._turns(positions)

    def switch(self, adapted: bool) -> None:
        """Let the adapter take part, or leave it out."""
        self.strength.fill_(self.scale if adapted else 0.0)

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor,
        attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """The last layer's normed output, [tokens, width]; what tokens have as keys and values is cached.

        Args:
            ids: [tokens]. positions, slots: int32 [tokens]. cache: [layers, 2, key heads, slots, head].
            attend: q, keys and values of a layer to [tokens, queries * head].
        """
        on = self.strength
        x = F.embedding(ids, self.embeddings)
        y: torch.Tensor | None = None
        lows: torch.Tensor | None = None
        ups: torch.Tensor | None = None
        for number, layer in enumerate(self.layers):
            normed = decode_ops.add_norm(x, y, lows, ups, on, layer.first_norm, self.eps)
            keys, values = cache[number]
            group = layer.qkv
            y, lows = group(normed)
            q = decode_ops.place(
                y, lows, group.ups, group.columns, on, self.turns, layer.head_norms, self.eps,
                positions, slots, keys, values, self.heads,
            )  # fmt: skip
            y, lows = layer.o(attend(q, keys, values))
            normed = decode_ops.add_norm(x, y, lows, layer.o.ups, on, layer.second_norm, self.eps)
            group = layer.wide
            y, lows = group(normed)
            wide = decode_ops.gate(y, lows, group.ups, group.columns, on, self.wide)
            y, lows = layer.down(wide)
            ups = layer.down.ups
        return decode_ops.add_norm(x, y, lows, ups, on, self.norm, self.eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary] of the last layer's output [rows, width]."""
        return product(hidden, self.head)

    def read(
        self, ids: torch.Tensor, bounds: torch.Tensor, longest: int, slots: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Cache whole prompts, and return the logits of what comes next, [prompts, vocabulary].

        Args:
            ids: of all prompts, one after the other, [tokens]. bounds: where each begins, and the end, int32
                [prompts + 1]. longest: tokens of the longest. slots, cache: see `forward`.
        """
        lengths = bounds.diff()
        begins = bounds[:-1].repeat_interleave(lengths, output_size=len(ids))
        positions = torch.arange(len(ids), dtype=torch.int32, device=ids.device) - begins

        def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            head = self.heads[2]
            found, _ = attention.attend(
                None, q.unflatten(1, (-1, head)).transpose(0, 1)[None], keys[None, :, slots.long()],
                values[None, :, slots.long()], None, bounds=bounds, longest=longest, uniform=False,
                scaling=head**-0.5,
            )  # fmt: skip
            return found[0].flatten(1)

        hidden = self.forward(ids, positions, slots, cache, attend)
        return self.logits(hidden[bounds[1:].long() - 1])

    def step(
        self, ids: torch.Tensor, positions: torch.Tensor, starts: torch.Tensor, slots: torch.Tensor,
        cache: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The logits of what follows one token of each answer, [rows, vocabulary].

        Args:
            ids: [rows]. positions, starts, slots: of the token, and where its text begins in the cache, int32
                [rows]. cache: see `forward`.
        """

        def attend(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            scale = self.heads[2] ** -0.5
            return decode_ops.attend(q, keys, values, starts, slots, self.heads, scale)

        return self.logits(self.forward(ids, positions, slots, cache, attend))

    def cache(self, slots: int) -> torch.Tensor:
        """Room for the keys and values of so many tokens."""
        _, shared, head = self.heads
        shape = (len(self.layers), 2, shared, slots, head)
        return torch.zeros(shape, dtype=self.dtype, device=self.place)


def _check(tuned: Any, causal: Any) -> float:
    """The adapter's scale; or why this model is not known."""
    kind = causal.config.model_type
    if kind not in KNOWN:
        raise Unknown(f"{kind} is not a decoder known here")
    if causal.model.rotary_emb.rope_type not in ROPE:
        raise Unknown(f"{causal.model.rotary_emb.rope_type} rotation is not known here")
    found = lora.layers(tuned)
    if not lora.simple(tuned) or any(len(layer.active_adapters) != 1 for layer in found):
        raise Unknown("the adapter has dora, a bias, or others beside it")
    kinds = {(layer.r[n], layer.scaling[n]) for layer in found for n in layer.active_adapters}
    if len(kinds) != 1 or isinstance(causal.get_output_embeddings(), LoraLayer):
        raise Unknown("the adapter has several ranks or scales, or one on the head")
    if causal.get_output_embeddings().bias is not None or causal.config.hidden_act != "silu":
        raise Unknown(f"this {kind} has a bias on its head, or an activation that is not silu")
    return float(kinds.pop()[1])


def _window(config: Any) -> int | None:
    """Tokens that a layer sees at most; None sees all."""
    if not getattr(config, "use_sliding_window", True):
        return None
    return getattr(config, "sliding_window", None)


def _layer(layer: Any, dtype: torch.dtype, unpack: bool) -> Layer:
    parents = (layer.self_attn, layer.self_attn, layer.mlp, layer.mlp)
    qkv, o, wide, down = (
        Group([getattr(parent, name) for name in names], dtype, unpack)
        for parent, names in zip(parents, GROUPS, strict=True)
    )
    own = [getattr(layer.self_attn, name, None) for name in ("q_norm", "k_norm")]
    norms = tuple(norm.weight.detach() for norm in own if norm is not None)
    return Layer(
        layer.input_layernorm.weight.detach(), qkv, norms if len(norms) == 2 else None, o,
        layer.post_attention_layernorm.weight.detach(), wide, down,
    )  # fmt: skip


@torch.no_grad()
def logits_of(tuned: Any, precision: str, ids: torch.Tensor) -> torch.Tensor:
    """What the model itself says of a text [tokens] with its adapter, fp32 [tokens, vocabulary]."""
    with load.compute(precision):
        found = tuned(input_ids=ids[None], use_cache=False).logits[0]
    return torch.as_tensor(found).float()
