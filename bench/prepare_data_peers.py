"""What `bench.prepare_data` measures beside the stage; each runs as a process of its own.

- encode_batch_fast, the ceiling: `Tokenizer.encode_batch_fast` on rendered texts in memory, BATCH
  at a time, all threads. The calls alone are timed.
- datasets: `load_dataset("json")`, `map(batched=True, num_proc=cores)` over `apply_chat_template`
  with truncation, `save_to_disk`.
- trl: the constructor of `SFTTrainer` over a Llama of one tiny layer on the CPU. It calls
  `_prepare_dataset`: chat template and tokens, labels, truncation, and the filter for rows without
  a label, each a `map` or `filter` with `num_proc=cores`. Then `train_dataset.save_to_disk`.

The embedded model's template has no generation marks: `apply_chat_template` gives no mask of what
the assistant says, and trl refuses `assistant_only_loss`. So both write ids (trl: labels of all
tokens too), which is less work than the stage does. Where `marked` is not empty, they get the same
template with marks, and write the mask.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

CORES = len(os.sched_getaffinity(0))
MAX_LENGTH = 1024
BATCH = 1000
CEILING, DATASETS, TRL = "encode_batch_fast", "datasets", "trl"
# One turn in the embedded model's template, and the same with marks around what the assistant says.
SAID = "'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
MARKED = (
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    f"{{% else %}}{{{{ {SAID} }}}}{{% endif %}}"
)


def ceiling(folder: str, rows: str) -> None:
    """Time the encoding alone; prints seconds, tokens, and the tokens that MAX_LENGTH leaves."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with open(rows, encoding="utf-8") as lines:
        said = [json.loads(line)["messages"] for line in lines]
    texts = tokenizer.apply_chat_template(said, tokenize=False)
    del said
    seconds, tokens, within = 0.0, 0, 0
    for start in range(0, len(texts), BATCH):
        batch = texts[start : start + BATCH]
        begun = time.perf_counter()
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        seconds += time.perf_counter() - begun
        lengths = [len(row) for row in encoded]
        tokens += sum(lengths)
        within += sum(min(length, MAX_LENGTH) for length in lengths)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "within": within}))


def _tokenizer(folder: str, marked: str) -> Any:
    """The tokenizer; its template marks what the assistant says where `marked` is not empty."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if marked:
        was = tokenizer.chat_template
        tokenizer.chat_template = was.replace("{{" + SAID + "}}", MARKED)
        assert tokenizer.chat_template != was, "the embedded model has another chat template now"
    return tokenizer


def with_datasets(folder: str, rows: str, target: str, marked: str) -> None:
    """What one writes with `datasets` alone."""
    from datasets import load_dataset

    tokenizer = _tokenizer(folder, marked)

    def tokenise(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            batch["messages"], return_dict=True, truncation=True, max_length=MAX_LENGTH,
            return_assistant_tokens_mask=bool(marked),
        )  # fmt: skip
        return {name: found[name] for name in ("input_ids", "assistant_masks") if name in found}

    loaded = load_dataset("json", data_files=rows, split="train")
    mapped = loaded.map(tokenise, batched=True, num_proc=CORES, remove_columns=loaded.column_names)
    mapped.save_to_disk(target)


def with_trl(folder: str, rows: str, target: str, marked: str) -> None:
    """TRL's own preparation, which the constructor of its trainer does."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = _tokenizer(folder, marked)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    arguments = SFTConfig(
        output_dir=f"{target}-trainer", max_length=MAX_LENGTH, dataset_num_proc=CORES,
        assistant_only_loss=bool(marked), use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    loaded = load_dataset("json", data_files=rows, split="train")
    trainer = SFTTrainer(
        LlamaForCausalLM(shape), arguments, train_dataset=loaded, processing_class=tokenizer
    )
    trainer.train_dataset.save_to_disk(target)


WORKERS: dict[str, Callable[..., None]] = {
    CEILING: ceiling, DATASETS: with_datasets, TRL: with_trl,
}  # fmt: skip


if __name__ == "__main__":
    WORKERS[sys.argv[1]](*sys.argv[2:])
