"""A Llama with random weights and a tokenizer for it, so that every system loads the same without a hub.

    python bench/train_model.py CONVERSATIONS.jsonl FOLDER 7b    # or tiny, for a look on a CPU

Speed does not depend on what the weights say. The tokenizer is a BPE of the conversations with as many tokens
as cut them into about the lengths that they have in Llama 2's: 427 on average, where Llama 2 has 429.
"""

import json
import sys
from typing import Any

TOKENS = 9000
VOCABULARY = 32_000
# Hidden size, that of the MLP, layers, heads.
SHAPES = {"7b": (4096, 11008, 32, 32), "tiny": (64, 176, 2, 4)}
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def write_tokenizer(texts: list[str], folder: str) -> None:
    """Learn a tokenizer from texts; it begins a text with no token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=list(SPECIAL.values()), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>", **SPECIAL)
    whole.save_pretrained(folder)


def made(shape: str) -> Any:
    """The model, its weights in bf16, drawn on the GPU where there is one."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=4096,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    return model


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as lines:
        write_tokenizer([json.loads(line)["text"] for line in lines], sys.argv[2])
    made(sys.argv[3]).save_pretrained(sys.argv[2], max_shard_size="5GB")
