"""How text becomes token ids and a mask: by position, so that EOS is learned whatever pads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.lib.data.conversation import Segment
from stages.lib.run.exits import BadData, CannotRun

# Names that base models reserve for such use, should they have no `unk`.
RESERVED = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<|endoftext|>",
)


class Tokens:
    """A base model's tokenizer, without torch.

    Attributes:
        eos: id of the token that ends an answer. pad: id that fills a batch; never EOS where the
        vocabulary has another that means nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.fast = _load(folder)
        if self.fast.eos_token_id is None:
            raise BadData(
                f"the tokenizer in {folder} has no EOS token, so no answer could ever end"
            )
        self.backend = self.fast.backend_tokenizer
        self.backend.no_padding()
        self.backend.no_truncation()
        # A row that says "</s>" means these four characters.
        self.backend.encode_special_tokens = True
        self.eos: int = self.fast.eos_token_id
        self.pad = self._choose_pad()
        self.fast.pad_token_id = self.pad
        self._add_missing_bos(folder)

    def _choose_pad(self) -> int:
        pad, unk = self.fast.pad_token_id, self.fast.unk_token_id
        if pad is not None and pad != self.eos:
            return int(pad)
        if unk is not None and unk != self.eos:
            return int(unk)
        vocabulary = self.fast.get_vocab()
        reserved = [vocabulary[name] for name in RESERVED if name in vocabulary]
        return next((i for i in reserved if i != self.eos), self.eos)

    def _add_missing_bos(self, folder: Path) -> None:
        """Put BOS first where the model was trained with it and the tokenizer's own files forget it."""
        from tokenizers.processors import Sequence, TemplateProcessing

        bos, path = self.fast.bos_token, folder / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.is_file() else {}
        # A SentencePiece model alone says nothing; the models of that time begin with BOS.
        wanted = config.get("add_bos_token", not (folder / "tokenizer.json").is_file())
        if wanted and bos and self.fast.bos_token_id not in self.backend.encode("").ids:
            first = TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A $B",
                special_tokens=[(bos, self.fast.bos_token_id)],
            )
            own = self.backend.post_processor
            self.backend.post_processor = Sequence([own, first]) if own else first

    def __len__(self) -> int:
        return len(self.fast)

    def encode(
        self, rows: Sequence[Sequence[Segment]], with_mask: bool
    ) -> list[tuple[list[int], list[bool]]]:
        """Ids and mask of each row, one EOS at the end of each.

        The mask says which tokens are learned: those that begin inside a trained segment, and EOS behind one.
        The first token is never learned, as nothing comes before it.

        Args:
            rows: rendered segments. with_mask: False when every segment is trained, which is faster.
        """
        texts = ["".join(segment.text for segment in row) for row in rows]
        encode = self.backend.encode_batch if with_mask else self.backend.encode_batch_fast
        found = []
        for row, encoding in zip(rows, encode(texts), strict=True):
            ids = encoding.ids
            if ids and ids[-1] == self.eos:  # some tokenizers add it themselves
                ids = ids[:-1]
            trained = _mask(row, encoding.offsets[: len(ids)]) if with_mask else [True] * len(ids)
            ends_trained = bool(row) and row[-1].trained
            mask = [*trained, ends_trained]
            mask[0] = False
            found.append(([*ids, self.eos], mask))
        return found

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt that the model is to continue, with the BOS that training rows had."""
        ids = self.backend.encode(text).ids
        return ids[:-1] if ids and ids[-1] == self.eos else list(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files, for an adapter or a merged model."""
        self.backend.encode_special_tokens = False
        self.fast.save_pretrained(folder)
        self.backend.encode_special_tokens = True


def _load(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        # A SentencePiece model alone is converted, which needs torch.
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise BadData(
            f"the tokenizer in {folder} cannot be read ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    if not found.is_fast:
        raise CannotRun(f"{folder} has no fast tokenizer (tokenizer.json); choose another base")
    return found


def _mask(row: Sequence[Segment], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    ends, position = [], 0
    for segment in row:
        position += len(segment.text)
        ends.append(position)
    mask, index = [], 0
    for start, end in offsets:
        if start == end:  # BOS covers no text
            mask.append(False)
            continue
        while index < len(ends) - 1 and start >= ends[index]:
            index += 1
        mask.append(row[index].trained)
    return mask
