"""Chat formats: how a conversation is written for a model. The one rendering that all stages share."""

import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.data import conversation
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.shapes import Misfit
from stages.lib.data.templates import Segment, Template
from stages.lib.data.tokens import Tokens
from stages.lib.run.artifact import sha256
from stages.lib.run.exits import BadData, BadSetting, CannotRun, Missing
from stages.lib.run.progress import say

FOLDER = Path(__file__).parent / "chat_formats"
OURS = ("guanaco", "alpaca", "chatml", "llama2")
TEXT, TOKENIZER, AUTO = "text", "tokenizer", "auto"
NAMES = (AUTO, TOKENIZER, *OURS, TEXT)
FILE = "prompt_format.json"
# Rendered and tokenised with the data, and compared wherever the adapter is used.
GOLDEN = Conversation(
    (
        Turn("system", "Be brief."), Turn("user", "What is 2 + 2?"), Turn("assistant", "4"),
        Turn("user", "Why?"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Stops:
    """What ends an answer: texts that a model says instead of going on, and token ids."""

    texts: tuple[str, ...]
    ids: tuple[int, ...]


class Format:
    """A chat format with a tokenizer.

    Args:
        name: of the format, as `CHAT_FORMAT` has it. source: its Jinja template, None for plain text.
        loss_on: `assistant` or `all`. date: what a template is told of the day, `YYYY-MM-DD`.

    Attributes:
        stops: what ends an answer.
        forced: whether it is used although the adapter was trained with another.
        folds_system: whether a system turn becomes part of the first question, as the template refuses one.
        knows_tools, knows_context: whether the template writes these; else they become part of the turns.
    """

    def __init__(
        self, name: str, source: str | None, tokens: Tokens, loss_on: str, date: str
    ) -> None:
        self.name, self.source, self.tokens, self.loss_on, self.date = (
            name, source, tokens, loss_on, date,
        )  # fmt: skip
        self.template = source and Template(
            source, name, date, tokens.names, tokens.specials, loss_on == "all"
        )
        self.knows_tools = "tool_calls" in (source or "")
        self.knows_context = self._writes_context()
        self.folds_system = self.forced = False
        self.folds_system = bool(source) and self._refuses(GOLDEN)
        self.stops = self._find_stops()

    def _refuses(self, asked: Conversation) -> bool:
        try:
            self._segments(asked, prompt=True)
        except Misfit:
            return True
        return False

    def _writes_context(self) -> bool:
        asked = Turn("user", "What is it about?", "Cats.")
        try:
            written = self.template and self.template.render(Conversation((asked,)), prompt=True)
        except Misfit:
            return False
        return asked.context in (written or "")

    def segments(self, said: Conversation) -> list[Segment]:
        """A conversation as it is learned; its last answer ends in a special token.

        Raises:
            Misfit: the format cannot write it.
        """
        found = self._segments(said, prompt=False)
        if found and found[-1].id is None:
            last = found[-1]
            found[-1] = last._replace(ends=False)
            found.append(
                Segment(self.tokens.names["eos_token"], last.learned, self.tokens.eos, True)
            )
        return found

    def prompt(self, asked: Conversation) -> list[int]:
        """The ids that the model is to continue: the conversation so far and the mark of an answer."""
        return self.tokens.encode_prompt(self._segments(asked, prompt=True))

    def prompt_text(self, asked: Conversation) -> str:
        """The same as text."""
        return "".join(segment.text for segment in self._segments(asked, prompt=True))

    def continued(self, messages: Sequence[dict[str, Any]]) -> str:
        """The prompt's text for messages of the common form (`role`, `content`)."""
        return self.prompt_text(conversation.loads({"messages": messages, "tools": []}))

    def _segments(self, said: Conversation, prompt: bool) -> list[Segment]:
        if conversation.is_plain(said) or not self.template:
            texts = [turn.text for turn in said.turns if turn.text]
            return [Segment("\n\n".join(texts), True)]
        if said.tools or any(turn.calls or turn.role == "tool" for turn in said.turns):
            said = said if self.knows_tools else conversation.without_tools(said)
        if not self.knows_context:
            said = conversation.with_folded_context(said)
        if self.folds_system:
            said = conversation.with_folded_system(said)
        return self.template.segments(said, prompt)

    def _find_stops(self) -> Stops:
        if not self.template:
            return Stops((), (self.tokens.eos,))
        turns = GOLDEN.turns[1:]
        segments = self.segments(Conversation((*turns, Turn("assistant", "So."))))
        ids = {s.id for s in segments if s.ends and s.id is not None} | {self.tokens.eos}
        # Where no special token closes an answer, the mark behind it does.
        answered = next(n for n, s in enumerate(segments) if s.ends)
        text = ""
        if segments[answered].id is None:
            told = [s.text for s in segments[: answered + 1] if s.learned]
            own = "".join(told).rpartition(turns[1].text)[2]
            text = own if own.strip() else segments[answered + 1].text
        first = next((line.strip() for line in text.split("\n") if line.strip()), "")
        return Stops((first,) if first else (), tuple(sorted(ids)))

    def marks(self) -> tuple[str, ...]:
        """What stands between turns and no answer should hold: lines of the format, and special tokens."""
        between: list[str] = []
        if self.template:
            rest = self.prompt_text(GOLDEN)
            for turn in GOLDEN.turns:
                before, _, rest = rest.partition(turn.text)
                between.append(before)
            between.append(rest)
        specials = tuple(sorted(filter(None, self.tokens.specials), key=len, reverse=True))
        for word in specials:
            between = [text.replace(word, "\n") for text in between]
        lines = [line.strip() for text in between for line in text.split("\n")]
        return tuple(dict.fromkeys([*(line for line in lines if len(line) > 2), *specials]))

    def recorded(self) -> dict[str, Any]:
        """What `load` needs to render the same prompts, with the proof that it does."""
        golden = GOLDEN if self.source else Conversation((Turn(TEXT, GOLDEN.turns[1].text),))
        return {
            "chat_format": self.name,
            "template": self.source,
            "date": self.date,
            "loss_on": self.loss_on,
            "folds_system": self.folds_system,
            "stops": list(self.stops.texts),
            "stop_ids": list(self.stops.ids),
            "golden": {"text": self.prompt_text(golden), "ids": self.prompt(golden)},
        }

    def save(self, folder: Path) -> None:
        """Write `prompt_format.json`."""
        text = json.dumps(self.recorded(), indent=1, ensure_ascii=False)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, tokens: Tokens) -> "Format":
        """The format that a data artifact or an adapter was made with.

        Raises:
            CannotRun: its golden prompt is now rendered or tokenised otherwise.
        """
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
        try:
            found = cls(
                known["chat_format"], known["template"], tokens, known["loss_on"], known["date"]
            )
            same = found.recorded() == known
        except (Misfit, KeyError):  # an older version recorded less
            same = False
        if not same:
            raise CannotRun(
                f"{folder / FILE}: prompts are now rendered or tokenised otherwise than in training; "
                "use the versions in its manifest, or run `prepare-data` and `train` again"
            )
        return found


def spoken(folder: Path, tokens: Tokens, wanted: str, forced: bool) -> Format:
    """The format that an adapter was trained with, or the one of `CHAT_FORMAT` if that is forced.

    Raises:
        CannotRun: `wanted` is another, and not forced. Others: as `Format.load` and `choose`.
    """
    known = Format.load(folder, tokens)
    named = wanted == known.name and (wanted in (*OURS, TEXT) or not Path(wanted).is_file())
    if wanted == AUTO or (named and wanted != TOKENIZER):
        return known
    other, _ = choose(wanted, tokens, (), known.loss_on)
    if other.source == known.source:
        return known
    says = "now has another template" if wanted == known.name else f"is {wanted}"
    said = (
        f"the adapter in {folder} was trained with the chat format {known.name}, CHAT_FORMAT {says}"
    )
    if not forced:
        raise CannotRun(
            f"{said}; leave that out (or say auto), or answer in it all the same with --force-format"
        )
    say(f"{said}, and is used, as FORCE_FORMAT says: the model has not learned it")
    other.forced = True
    return other


def choose(
    wanted: str, tokens: Tokens, shapes: Collection[str], loss_on: str
) -> tuple[Format, str]:
    """The chat format, and why it is this one.

    Args:
        wanted: `CHAT_FORMAT`. shapes: of the data sets.

    Raises:
        BadSetting, Missing: no such format or file, or it cannot write. BadData: the tokenizer has no template.
    """
    name, why = wanted, "CHAT_FORMAT says so"
    if wanted == AUTO:
        name, why = _chosen(tokens, shapes)
    source, date = _source(name, tokens), time.strftime("%Y-%m-%d", time.gmtime())
    try:
        return Format(name, source, tokens, loss_on, date), why
    except Misfit as reason:
        raise BadSetting(
            f"CHAT_FORMAT {name} cannot write a plain question and answer: {reason}; mend it, or choose another"
        ) from reason


def _chosen(tokens: Tokens, shapes: Collection[str]) -> tuple[str, str]:
    if set(shapes) == {"text"}:
        return TEXT, "the rows are plain text"
    if "guanaco" in shapes:
        return "guanaco", "the rows are written in it"
    if tokens.chat_template:
        return TOKENIZER, "the base model's tokenizer has a chat template"
    if {"<|im_start|>", "<|im_end|>"} <= tokens.specials.keys():
        return "chatml", "the tokenizer has its marks as tokens, and no chat template"
    if "alpaca" in shapes:
        return "alpaca", "the rows have its columns, and the tokenizer has no chat template"
    return "guanaco", "it needs no special tokens, and the tokenizer has no chat template"


def reference(wanted: str) -> str | None:
    """The sha256 of a `CHAT_FORMAT` that is a file, None of one that is a name.

    Raises:
        BadSetting: it is a word that is no format. Missing: there is no such file.
    """
    if wanted in NAMES:
        return None
    path = Path(wanted)
    if path.suffix not in (".jinja", ".jinja2", ".j2"):
        raise BadSetting(
            f"CHAT_FORMAT {wanted!r} is none of {', '.join(NAMES)}, and no .jinja file; choose one"
        )
    if not path.is_file():
        raise Missing(
            f"there is no chat template {path.absolute()}; it must be mounted at the same path"
        )
    return sha256(path)


def _source(name: str, tokens: Tokens) -> str | None:
    reference(name)
    if name == TEXT:
        return None
    if name == TOKENIZER:
        if not tokens.chat_template:
            near = ", ".join(OURS)
            raise BadData(
                "the base model's tokenizer has no chat template; choose CHAT_FORMAT among "
                f"{near} or a .jinja file"
            )
        return tokens.chat_template
    path = FOLDER / f"{name}.jinja" if name in OURS else Path(name)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadSetting(
            f"the chat template {path} is not UTF-8 at byte {error.start}; convert it"
        ) from error
