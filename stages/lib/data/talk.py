"""A talk with the model: what was said so far, as far as the model's context holds it."""

from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import Format
from stages.lib.data.shapes import Misfit
from stages.lib.run.exits import BadData


class Talk:
    """Questions and answers in turn.

    Args:
        room: tokens that a prompt may have; None is any number. system: what stands before all.

    Attributes:
        dropped: pairs of question and answer that the last question left no room for.
    """

    def __init__(self, chat_format: Format, room: int | None, system: str = "") -> None:
        self.chat_format, self.room, self.system = chat_format, room, system
        self.turns: list[Turn] = []
        self.dropped = 0

    def ask(self, text: str) -> list[int]:
        """The ids of all that was said and a question; the oldest pairs go where they do not fit.

        Raises:
            BadData: the question alone does not fit, or the format cannot write it.
        """
        kept = self.turns
        while True:
            ids = self._ids([*kept, Turn("user", text)])
            if self.room is None or len(ids) <= self.room:
                break
            if not kept:
                raise BadData(
                    f"the question has {len(ids)} tokens, {self.room} are left beside MAX_NEW_TOKENS; "
                    "shorten one of them"
                )
            kept = kept[2:]
        self.dropped, self.turns = (len(self.turns) - len(kept)) // 2, kept
        return ids

    def _ids(self, turns: list[Turn]) -> list[int]:
        opening = [Turn("system", self.system)] if self.system else []
        try:
            return self.chat_format.prompt(Conversation((*opening, *turns)))
        except Misfit as reason:
            raise BadData(f"it cannot be written as {self.chat_format.name}: {reason}") from reason

    def answered(self, question: str, answer: str) -> None:
        """Keep a pair; a question without an answer is forgotten."""
        if answer.strip():
            self.turns = [*self.turns, Turn("user", question), Turn("assistant", answer)]

    def reset(self) -> None:
        """Forget what was said."""
        self.turns = []
