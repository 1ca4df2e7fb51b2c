"""export: the merged model as one GGUF file, for llama.cpp and Ollama.

Reads `merged/` in the run directory, and the recorded chat format of `adapter/`.
Writes `gguf/`: `model.gguf`, read back and compared before it is published, `export_report.json` on what it
lost, and a `Modelfile` for Ollama where the chat format can be said in one.
"""

import json

import click

from stages.lib.run.options import run_options
from stages.lib.run.rundir import Run
from stages.lib.run.settings import Stage, setting


@click.command("export", cls=Stage)
@setting(
    "--gguf-type", "GGUF_TYPE", type=click.Choice(["auto", "bf16", "f16", "f32", "q8_0"]), default="auto",
    help="How weights are stored: as they are, or in another type; q8_0 halves bf16.",
)  # fmt: skip
@run_options
@click.pass_context
def export(ctx: click.Context, /, gguf_type: str, **run_settings: object) -> None:
    """Write the merged model as a GGUF file and read it back."""
    from stages.lib.report.table import table

    run = Run(ctx)
    merged, made = run.read("merged", deep=True), run.read("adapter")
    run.check_made_from(merged, "adapter", made.digest)
    inputs = {"merged": merged.digest, "adapter": made.digest}
    if run.finished("gguf", inputs):
        return
    with run.work() as scratch:
        from stages.lib.data import gguf_vocabulary, modelfile
        from stages.lib.data.formats import Format
        from stages.lib.data.tokens import Tokens
        from stages.lib.model import exporting
        from stages.lib.model.base import Base
        from stages.lib.run.progress import say

        base, tokens = Base(str(merged.path), None), Tokens(merged.path)
        base.fetch(verify=run.deep)
        chat_format = Format.load(made.path, tokens)
        fields = gguf_vocabulary.fields(tokens, chat_format, base.config["vocab_size"])
        job = exporting.Export(
            merged.path, gguf_type, fields, exporting.title(merged.manifest["inputs"])
        )
        with run.draft("gguf", job.size) as draft:
            with draft.stream(exporting.FILE) as file:
                job.write(scratch, file)
            report, read = job.compare(draft.path / exporting.FILE)
            gguf_vocabulary.check(read, tokens, chat_format)
            said = gguf_vocabulary.remarks(tokens)
            said += modelfile.write(chat_format, exporting.FILE, scratch)
            report |= {"vocabulary": len(tokens), "remarks": said}
            (scratch / exporting.REPORT).write_text(json.dumps(report, indent=1) + "\n")
            for path in sorted(scratch.iterdir()):
                draft.move(path)
            metrics = {key: value for key, value in report.items() if key != "remarks"}
            draft.finish(run.manifest(inputs, metrics))
        for sentence in said:
            say(sentence)
    click.echo(table(("export", "value"), list(metrics.items())))
