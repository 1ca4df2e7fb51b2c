"""A Go template is written only where it renders what the chat format renders."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.data import modelfile
from stages.lib.data.conversation import Conversation, Turn
from stages.lib.data.formats import OURS, TEXT, Format, choose
from stages.lib.data.tokens import Tokens
from tests import go_templates
from tests.lib.data import chat_templates

QUOTES = Turn("user", 'He said """yes""", {{ .Role }} and <b> & ünïcode\t\\n')
CONVERSATIONS = (
    *modelfile.GOLDEN,
    Conversation((QUOTES,)),
    Conversation((Turn("system", "A\nB"), QUOTES, Turn("assistant", "So."), QUOTES)),
    Conversation((QUOTES, QUOTES, Turn("assistant", ""), QUOTES)),
)
Tokenizers = Callable[[str], Tokens]


def formatted(name: str, tokens: Tokens, source: str | None = None) -> Format:
    if source is None:
        return choose(name, tokens, ("messages",), "assistant")[0]
    return Format("tokenizer", source, tokens, "assistant", "2026-11-25")


def messages(said: Conversation) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in said.turns]


def expected(chat_format: Format, said: Conversation) -> str:
    text, tokens = chat_format.prompt_text(said), chat_format.tokens
    return text if tokens.bos is None else text.removeprefix(tokens.names["bos_token"])


@pytest.mark.parametrize("kind", ["embedded", "llama2"])
@pytest.mark.parametrize("name", [*OURS, TEXT])
def test_ours_are_rendered_the_same(tokenizers: Tokenizers, name: str, kind: str) -> None:
    chat_format = formatted(name, tokenizers(kind))
    template = modelfile.template(chat_format)
    assert template is not None
    for said in CONVERSATIONS:
        turns = [turn for turn in said.turns if turn.text]  # plain text leaves empty turns out
        said = Conversation(tuple(turns)) if name == TEXT else said
        assert go_templates.render(template, messages(said)) == expected(chat_format, said)


def test_a_tokenizers_own_template_with_its_default_system_turn(tokenizers: Tokenizers) -> None:
    tokens = tokenizers("embedded")
    chat_format = formatted("tokenizer", tokens)
    template = modelfile.template(chat_format)
    assert template is not None
    assert "SmolLM" in template
    for said in CONVERSATIONS:
        assert go_templates.render(template, messages(said)) == expected(chat_format, said)


def test_a_template_that_writes_bos(tokenizers: Tokenizers) -> None:
    """llama.cpp puts it first by itself."""
    source = "{{ bos_token }}" + chat_templates_chatml()
    chat_format = formatted("", tokenizers("llama2"), source)
    template = modelfile.template(chat_format)
    assert template is not None
    assert "<s>" not in go_templates.render(template, messages(CONVERSATIONS[0]))
    # A tokenizer that does not put it there leaves nobody who does.
    assert modelfile.template(formatted("", tokenizers("embedded"), "Hm." + source)) is None


def chat_templates_chatml() -> str:
    from stages.lib.data.formats import FOLDER

    return (FOLDER / "chatml.jinja").read_text()


@pytest.mark.parametrize("source", ["GEMMA", "MISTRAL", "QWEN3", "trim"])
def test_templates_that_do_more_have_none(
    tokenizers: Tokenizers, source: str, tmp_path: Path
) -> None:
    known = getattr(chat_templates, source, None)
    text = known or chat_templates_chatml().replace(
        "message['content']", "(message['content'] | trim)"
    )
    chat_format = formatted("", tokenizers("embedded"), text)
    assert modelfile.template(chat_format) is None
    remarks = modelfile.write(chat_format, "model.gguf", tmp_path)
    assert "there is no Modelfile" in remarks[0]
    assert list(tmp_path.iterdir()) == []


def test_the_file(tokenizers: Tokenizers, tmp_path: Path) -> None:
    chat_format = formatted("guanaco", tokenizers("embedded"))
    remarks = modelfile.write(chat_format, "model.gguf", tmp_path)
    text = (tmp_path / "Modelfile").read_text()
    first, *_ = text.splitlines()
    assert first == "FROM ./model.gguf"
    assert f'TEMPLATE """{modelfile.template(chat_format)}"""\n' in text
    assert text.endswith('PARAMETER stop """### Human:"""\nPARAMETER stop """<|im_end|>"""\n')
    assert "SYSTEM" not in text
    assert len(remarks) == 1
    assert "--reverse-prompt '### Human:'" in remarks[0]


PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type Message struct { Role, Content string }
func main() {
	var asked []struct { Template string; Messages []*Message }
	if err := json.NewDecoder(os.Stdin).Decode(&asked); err != nil { panic(err) }
	for _, one := range asked {
		made := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		if err := made.Execute(os.Stdout, map[string]any{"Messages": one.Messages}); err != nil { panic(err) }
		os.Stdout.WriteString("\\x00")
	}
}
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go here")
def test_go_itself_says_the_same(tokenizers: Tokenizers, tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(PROGRAM)
    asked, wanted = [], []
    for name in (*OURS, TEXT, "tokenizer"):
        chat_format = formatted(name, tokenizers("embedded"))
        template = modelfile.template(chat_format)
        assert template is not None
        for said in CONVERSATIONS:
            asked.append({"Template": template, "Messages": messages(said)})
            wanted.append(go_templates.render(template, messages(said)))
    result = subprocess.run(
        ["go", "run", tmp_path / "main.go"],
        input=json.dumps(asked), text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\0")[:-1] == wanted
