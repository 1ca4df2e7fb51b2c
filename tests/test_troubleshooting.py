"""docs/troubleshooting.md says what the code says."""

import re
from pathlib import Path

import pytest

from stages.lib.run import endings
from tests import troubleshooting
from tests.conftest import Stages
from tests.refusals import sentences
from tests.troubles import TROUBLES, Trouble

ROOT = Path(__file__).parent.parent
NAMES = [trouble.says or trouble.title for trouble in TROUBLES]


def test_the_page_is_fresh() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert page == troubleshooting.page(), "run `make docs`"


@pytest.mark.parametrize("trouble", TROUBLES, ids=NAMES)
def test_its_test_is_there_and_has_its_words(trouble: Trouble) -> None:
    path, _, name = trouble.test.partition("::")
    text = (ROOT / path).read_text()
    assert re.search(rf"^def {name}\(", text, re.M), trouble.test
    assert trouble.proof in text
    if trouble.says:
        troubleshooting.found(trouble)


def test_every_way_to_fail_has_an_entry() -> None:
    """But for what is said by this program's traceback, by a stop, or from outside."""
    silent = {"done", "fault", "interrupted", "killed", "terminated"}
    told = {troubleshooting.CLASSES[troubleshooting.found(t)[0]].slug for t in TROUBLES if t.says}
    assert {row.slug for row in endings.ENDINGS} - silent <= told


COMMANDS = {
    "there is no preset": ["--env-file", "env/none.env", "train"],
    "... sets ..., which is no setting": ["--env-file", "wrong.env", "train"],
    "there is no data at": ["prepare-data", "--base-model", "sample", "--dataset", "none.csv"],
    "there is no finished ... in": ["evaluate"],
    "has no rows; it is empty": ["prepare-data", "--base-model", "sample", "--dataset", "empty.csv"],
    "which fit no shape": ["prepare-data", "--base-model", "sample", "--dataset", "odd.csv"],
    "is over the context of ..., ... tokens; lower it": [
        "prepare-data", "--base-model", "sample", "--dataset", "sample", "--max-length", "9000",
    ],
}  # fmt: skip


@pytest.mark.parametrize("says", COMMANDS)
def test_what_is_read_off_the_code_is_what_a_command_prints(
    stages: Stages, tmp_path: Path, says: str, sample_model: Path
) -> None:
    (tmp_path / "wrong.env").write_text("LEARNIN_RATE=1\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "odd.csv").write_text("colour,taste\nred,sweet\n")
    (trouble,) = (trouble for trouble in TROUBLES if trouble.says == says)
    kind, message = troubleshooting.found(trouble)
    done = stages(*COMMANDS[says])
    assert done.returncode == troubleshooting.CLASSES[kind].exit_code, done.stderr
    form = "(.|\n)*".join(map(re.escape, message.split("...")))
    assert re.search(form, "\n".join(sentences(done))), (message, done.stderr)


def test_a_message_that_is_said_nowhere_or_twice_is_refused() -> None:
    for says in ("said by nobody", "; lower it"):
        with pytest.raises(LookupError):
            troubleshooting.found(Trouble(says, "", "", "", ""))
