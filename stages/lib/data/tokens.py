"""How text becomes token ids and a mask: by position, so that EOS is learned whatever pads."""

import json
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stages.lib.data import tokenizer
from stages.lib.data.templates import Segment
from stages.lib.run.exits import BadData

# Names that base models reserve for such use, should they have no `unk`.
RESERVED = (
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|fim_pad|>",
    "<|endoftext|>",
)
MANY = 64  # texts, from which a thread for them costs nothing


class Run(NamedTuple):
    """A text to encode whole, or a special token (`id`); `within`: text comes before it."""

    text: str
    id: int | None
    learned: bool
    ends: bool
    within: bool


class Encoded(NamedTuple):
    """Rows as ids.

    Attributes:
        ids: int32 [tokens of all rows]. learned: bool [tokens of all rows].
        starts: where each row begins, and the end: int64 [rows + 1].
        ends: for each row, the tokens up to the end of each answer, where a token ends there.
    """

    ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    ends: list[list[int]]

    def row(self, number: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Ids and mask of one row."""
        where = slice(self.starts[number], self.starts[number + 1])
        return self.ids[where], self.learned[where]


class Tokens:
    """A base model's tokenizer, without torch.

    Attributes:
        eos: id of the token that ends an answer. pad: id that fills a batch; never EOS where the
        vocabulary has another that means nothing. bos: id that begins a row, or None.
        names: `bos_token`, `eos_token` and the like, as chat templates use them.
        specials: text and id of each special token. chat_template: the tokenizer's own, or None.
        begins_anew: whether text behind a special token is treated as the beginning of a text.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded = tokenizer.load(folder)
        self.backend, self.names = self._loaded.backend, dict(self._loaded.names)
        if "eos_token" not in self.names:
            raise BadData(
                f"the tokenizer in {folder} has no EOS token, so no answer could ever end"
            )
        self.backend.no_padding()
        self.backend.no_truncation()
        # A row that says "</s>" means these four characters.
        self.backend.encode_special_tokens = True
        self.eos: int = self._named("eos")
        self.pad = self._choose_pad()
        self.names["pad_token"] = self.backend.id_to_token(self.pad)
        self._add_missing_bos()
        first = self.backend.encode("a").ids[:1]
        self.bos: int | None = first[0] if first == [self._named("bos")] else None
        self._inner = _within_text(self.backend)
        self.begins_anew = self._begins_anew()
        added = self.backend.get_added_tokens_decoder()
        self.specials = {token.content: number for number, token in added.items() if token.special}
        # Some take the blanks beside them, as Phi-3's do.
        self._takes_before = {number for number, token in added.items() if token.lstrip}
        self._takes_behind = {number for number, token in added.items() if token.rstrip}
        template = self._loaded.template
        self.chat_template = template.get("default") if isinstance(template, dict) else template

    @cached_property
    def fast(self) -> Any:
        """The tokenizer as transformers has it."""
        found = self._loaded.fast or tokenizer.by_transformers(self.folder)
        found.backend_tokenizer.post_processor = self.backend.post_processor
        return found

    def _named(self, name: str) -> Any:
        """The id of the token that is called `bos`, `eos`, `pad` or `unk`, or None."""
        token = self.names.get(f"{name}_token")
        return None if token is None else self.backend.token_to_id(token)

    def _begins_anew(self) -> bool:
        """Whether the tokenizer treats text behind a special token as the beginning of a text."""
        if self._inner is self.backend:
            return False
        self.backend.encode_special_tokens = False
        ids = self.backend.encode(f"{self.names['eos_token']}a", add_special_tokens=False).ids
        self.backend.encode_special_tokens = True
        return bool(ids[1:] == self.backend.encode("a", add_special_tokens=False).ids)

    def _choose_pad(self) -> int:
        pad, unk = self._named("pad"), self._named("unk")
        if pad is not None and pad != self.eos:
            return int(pad)
        if unk is not None and unk != self.eos:
            return int(unk)
        vocabulary = self.backend.get_vocab()
        reserved = [vocabulary[name] for name in RESERVED if name in vocabulary]
        return next((i for i in reserved if i != self.eos), self.eos)

    def _add_missing_bos(self) -> None:
        """Put BOS first where the model was trained with it and the tokenizer's own files forget it."""
        from tokenizers.processors import Sequence, TemplateProcessing

        bos, path = self.names.get("bos_token"), self.folder / tokenizer.CONFIG
        config = json.loads(path.read_text()) if path.is_file() else {}
        # A SentencePiece model alone says nothing; the models of that time begin with BOS.
        wanted = config.get("add_bos_token", not (self.folder / tokenizer.FILE).is_file())
        if wanted and bos and self._named("bos") not in self.backend.encode("").ids:
            first = TemplateProcessing(
                single=f"{bos} $A",
                pair=f"{bos} $A $B",
                special_tokens=[(bos, self._named("bos"))],
            )
            own = self.backend.post_processor
            self.backend.post_processor = Sequence([own, first]) if own else first

    def __len__(self) -> int:
        return int(self.backend.get_vocab_size())

    def vocabulary(self) -> list[str]:
        """All tokens by id, up to the highest; an id that is none has an empty text."""
        known = {number: token for token, number in self.backend.get_vocab().items()}
        return [known.get(number, "") for number in range(max(known) + 1)]

    def encode(self, rows: Sequence[Sequence[Segment]]) -> "Encoded":
        """Ids and mask of each row: one BOS first where the model was trained with it, special tokens as such.

        Neighbouring segments that are both learned, or both not, are encoded as one text, so the mask lies
        between tokens and a prompt has the ids that it had in training. A row's first token is never learned,
        as nothing comes before it.
        """
        plans = [self._plan(row) for row in rows]
        texts: tuple[list[str], list[str]] = ([], [])  # at the beginning of a text, and within one
        for plan in plans:
            for run in plan:
                if run.id is None:
                    texts[run.within].append(run.text)
        encoded = [self._ids(self.backend, texts[0]), self._ids(self._inner, texts[1])]
        ids = array("i")  # four bytes each
        lengths, learned, starts, ends = [], [], [0], []
        for plan in plans:
            answers = []
            for run in plan:
                found = next(encoded[run.within]) if run.id is None else [run.id]
                ids.fromlist(found)
                lengths.append(len(found))
                learned.append(run.learned)
                if run.ends:
                    answers.append(len(ids) - starts[-1])
            starts.append(len(ids))
            ends.append(answers)
        mask = np.repeat(np.array(learned, dtype=bool), np.array(lengths, dtype=np.int64))
        bounds = np.array(starts, dtype=np.int64)
        mask[bounds[:-1][np.diff(bounds) > 0]] = False
        return Encoded(np.asarray(ids, dtype=np.int32), mask, bounds, ends)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has by itself."""
        return [len(ids) for ids in self._ids(self._inner, texts)]

    @staticmethod
    def _ids(backend: Any, texts: Sequence[str]) -> Iterator[list[int]]:
        encode = partial(backend.encode_batch_fast, texts, add_special_tokens=False)
        if len(texts) < MANY:
            encoded = encode()
        else:
            # What one thread allocates and another frees, glibc gives out in order again; what one thread
            # does both with, it gives out as it came back, and the next texts take a tenth longer.
            with ThreadPoolExecutor(1) as thread:
                encoded = thread.submit(encode).result()
        return (found.ids for found in encoded)

    def _plan(self, row: Sequence[Segment]) -> list["Run"]:
        """The runs of a row: texts to encode whole, and special tokens."""
        plan: list[Run] = []
        if self.bos is not None and not (row and row[0].id == self.bos):
            plan.append(Run("", self.bos, False, False, False))
        begins, special = True, False
        for segment in row:
            last = plan[-1] if plan else None
            if segment.id is not None:
                if segment.id in self._takes_before and last is not None and last.id is None:
                    plan[-1] = last._replace(text=last.text.rstrip())
                plan.append(Run("", segment.id, segment.learned, segment.ends, False))
                begins, special = False, True
                continue
            if last is not None and last.id in self._takes_behind:
                segment = segment._replace(text=segment.text.lstrip())
                if not segment.text:
                    continue
            if last is not None and last.id is None and last.learned == segment.learned:
                plan[-1] = last._replace(text=last.text + segment.text, ends=segment.ends)
                continue
            within = not (begins or (special and self.begins_anew))
            plan.append(Run(segment.text, None, segment.learned, segment.ends, within))
            begins = special = False
        return plan

    def encode_prompt(self, segments: Sequence[Segment]) -> list[int]:
        """The ids of a prompt that the model is to continue: those that training rows began with."""
        return [int(i) for i in self.encode([segments]).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens left out."""
        return str(self.fast.decode(ids, skip_special_tokens=True))

    def pieces(
        self, ids: Sequence[int], learned: Sequence[bool]
    ) -> Iterator[tuple[str, bool, bool]]:
        """A row as people read it: text, whether it is learned, whether it is a special token."""
        special = set(self.specials.values())
        kinds = [
            (bool(is_learned), i in special) for i, is_learned in zip(ids, learned, strict=True)
        ]
        # Behind a letter, as some decoders drop the first blank of a text.
        letter = self._inner.encode("a", add_special_tokens=False).ids
        start = 0
        for end in range(1, len(ids) + 1):
            if end == len(ids) or kinds[end] != kinds[start] or kinds[start][1]:
                text = self.backend.decode([*letter, *(int(i) for i in ids[start:end])], False)
                yield text.removeprefix("a"), *kinds[start]
                start = end

    def save(self, folder: Path, chat_template: str | None) -> None:
        """Write the tokenizer's files, for an adapter or a merged model that speaks `chat_template`."""
        own, self.fast.chat_template = self.fast.chat_template, chat_template
        self.fast.save_pretrained(folder)
        self.fast.chat_template = own


def _within_text(backend: Any) -> Any:
    """The tokenizer for text that goes on: without what it puts before a text (SentencePiece's blank)."""
    from tokenizers import Tokenizer

    described = json.loads(backend.to_str())

    def without(part: Any) -> Any:
        if isinstance(part, list):
            return [
                without(p) for p in part if not (isinstance(p, dict) and p.get("type") == "Prepend")
            ]
        if not isinstance(part, dict):
            return part
        part = {key: without(value) for key, value in part.items()}
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
        return None if part.get("type") == "Prepend" else part

    places = ("normalizer", "pre_tokenizer")
    changed = {place: without(described[place]) for place in places}
    if all(changed[place] == described[place] for place in places):
        return backend
    found = Tokenizer.from_str(json.dumps(described | changed))
    found.encode_special_tokens = True
    return found
