"""The card of an adapter or a merged model, as the hub reads it: how to prompt it, what made it, how well."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Manifest = Mapping[str, Any]
PROOF = {
    "mean_kl": "KL from base plus adapter as trained, nats a token",
    "top1_agreement": "tokens after which both find the same one most likely",
    "perplexity_as_trained": "perplexity of base plus adapter as trained",
    "perplexity": "perplexity of this model",
    "answers_equal": "share of the greedy answers' tokens that are equal until they part",
    "fold_kl": "KL from the same base with the adapter beside it, nats a token",
    "compared_tokens": "tokens of text compared",
}


@dataclass(frozen=True)
class Made:
    """What a card is written from.

    Attributes:
        base: see `Base.about`. prompts: see `Format.recorded`.
        adapters: manifests of those that are in it, and how much of each.
        data: the data's manifest, evaluation: that of the adapter's, None where there is none.
        merged: what the merge measured (`merging.summary`), None for an adapter. closer: which base is.
        versions: of the packages that made it.
    """

    base: Mapping[str, Any]
    prompts: Mapping[str, Any]
    adapters: Sequence[tuple[Manifest, float]]
    versions: Mapping[str, str]
    data: Manifest | None = None
    evaluation: Manifest | None = None
    merged: Mapping[str, Any] | None = None
    closer: str = ""


def write(made: Made, folder: Path) -> None:
    """Write the card: a YAML header that the hub accepts, and Markdown; the same bytes for the same facts."""
    (folder / FILE).write_text(card(made), encoding="utf-8")


def card(made: Made) -> str:
    """The card as text."""
    what = "LoRA adapter" if made.merged is None else "model with a LoRA adapter folded into it"
    parts = [
        f"# {PurePath(made.base['hub'] or made.base['name']).name}-lora",
        f"A {what}, made by lora-stages from {_base(made.base)}.",
        "## How to prompt it",
        *_prompting(made),
        "## What made it",
        *_making(made),
        "## Results",
        *_results(made),
        "## Licence",
        _licence(made.base),
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in made.versions.items()) + ".",
    ]
    return f"{_header(made)}\n" + "\n\n".join(parts) + "\n"


def _header(made: Made) -> str:
    """The YAML between two lines of dashes; JSON's strings and lists are YAML's."""
    sources = _sources(made.data)
    entries: dict[str, Any] = {
        "base_model": made.base["hub"],
        "base_model_relation": made.base["hub"] and ("finetune" if made.merged else "adapter"),
        **made.base["licence"],
        "library_name": "transformers" if made.merged else "peft",
        "pipeline_tag": "text-generation",
        "datasets": [s["name"] for s in sources if s.get("revision") and HUB_ID.fullmatch(s["name"])],
        "tags": ["lora", "lora-stages"] + (["merge"] if made.merged else []),
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}" for key, value in entries.items() if value]
    return "\n".join(["---", *lines, "---"])


def _base(base: Mapping[str, Any]) -> str:
    name = base["hub"] or base["name"]
    return f"`{name}`" + (f" at revision `{base['revision']}`" if base["revision"] else "")


def _prompting(made: Made) -> Iterator[str]:
    prompts = made.prompts
    if prompts["template"]:
        yield "`tokenizer.apply_chat_template` writes prompts as they were in training, such as:"
    else:
        yield "It was trained on plain text, which it continues, such as:"
    yield _fenced(prompts["golden"]["text"])
    ends = [f"the text `{stop}`" for stop in prompts["stops"]]
    ends += [f"the token of id {number}" for number in prompts["stop_ids"]]
    yield f"An answer ends in {', or '.join(ends)}." + (
        " A text that ends it has to be told to `generate`: "
        f"`stop_strings={json.dumps(prompts['stops'], ensure_ascii=False)}, tokenizer=tokenizer`."
        if prompts["stops"] and made.merged is not None
        else ""
    )


def _making(made: Made) -> Iterator[str]:
    for manifest, weight in made.adapters:
        metrics = manifest["metrics"]
        share = "" if len(made.adapters) == 1 and weight == 1 else f"{weight:g} times an adapter: "
        yield (
            f"{share}{metrics['steps']:,} steps, {_number(metrics['epochs'])} epochs over "
            f"{metrics['tokens']:,} tokens, of which {metrics['trained_tokens']:,} were learned, on a base in "
            f"{metrics['base_precision']}; data of digest `{manifest['inputs']['data']}`."
        )
    for source in _sources(made.data):
        files = [file["sha256"] for file in source.get("files", []) if "sha256" in file]
        named = f" at revision `{source['revision']}`" if source.get("revision") else ""
        hashes = f" (sha256 {', '.join(f'`{one}`' for one in files[:4])})" if files else ""
        more = f" and {len(files) - 4} files more" if len(files) > 4 else ""
        yield f"- data `{source['name']}`{named}{hashes}{more}"
    if made.data:
        counts = made.data["metrics"]
        yield (
            f"{counts['rows_kept']:,} rows of {counts['rows_read']:,} that were read, "
            f"{counts['rows_held_out']:,} of them held out; {counts['tokens']:,} tokens, "
            f"{counts['trainable_tokens']:,} learned; chat format {made.prompts['chat_format']}."
        )
    settings = (made.data or {}).get("settings", {})
    for manifest, _ in made.adapters:
        yield "The settings, as a preset has them:"
        settings = settings | manifest["settings"]
        lines = [
            f"{name}={entry['value']}"
            for name, entry in sorted(settings.items())
            if entry["value"] is not None and entry["value"] is not False
        ]
        yield _fenced("\n".join(lines))
        settings = {}


def _results(made: Made) -> Iterator[str]:
    for manifest, _ in made.adapters:
        loss = manifest["metrics"]["held_out_loss"]
        if loss is not None:
            yield f"Loss on held-out rows in training, nats a learned token: {loss:.4f}."
    if made.evaluation:
        sides = [made.evaluation["metrics"].get(side, {}) for side in ("base", "tuned")]
        rows = [
            (name.replace("_", " "), *(_number(side[name]) for side in sides))
            for name in sides[0]
            if all(isinstance(side.get(name), (int, float)) for side in sides)
        ]
        yield _table(("held-out rows", "base", "tuned"), rows)
    if made.merged is not None:
        yield "This model beside base plus adapter, on held-out text:"
        rows = [
            (words, _number(made.merged[name]))
            for name, words in PROOF.items()
            if made.merged.get(name) is not None
        ]
        yield _table(("compared", "value"), rows)
        yield made.closer


def _licence(base: Mapping[str, Any]) -> str:
    said = base["licence"]
    if not said:
        return "The base's files name no licence; look where it comes from."
    name = said.get("license_name") or said["license"]
    link = f", {said['license_link']}" if said.get("license_link") else ""
    return f"The base is under {name}{link}, and what is made from it is bound by that."


def _sources(data: Manifest | None) -> list[dict[str, Any]]:
    return list(data["inputs"]["dataset"]["sources"]) if data else []


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _fenced(text: str) -> str:
    """Text as it is, in a fence that it does not hold."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
