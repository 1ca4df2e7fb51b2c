"""Where a run comes from: every setting and its origin, versions, hashes, and who worked on it."""

from collections.abc import Iterator, Sequence
from typing import Any

from stages.lib.report.evaluation_page import facts, plain
from stages.lib.report.found import Found
from stages.lib.report.page import cut
from stages.lib.run.rundir import MADE_BY

ORIGINS = ("flag", "environment", "preset", "default")
MOST_ROWS, LONGEST = 300, 300  # rows of a table, and characters of what is in them
DIGITS = 12  # of a hash that is shown beside others; all of them stand with the files


def settings(found: Found) -> list[dict[str, Any]]:
    """Every setting that shaped an artifact: `name`, `value`, `origin` and `stages`, what was given first."""
    entries: dict[tuple[str, str, str], list[str]] = {}
    for name, made in found.artifacts.items():
        for variable, entry in made.manifest["settings"].items():
            key = (variable, plain(entry["value"]), str(entry["from"]))
            entries.setdefault(key, []).append(MADE_BY[name])
    rows = [
        {"name": name, "value": cut(value, LONGEST), "origin": origin, "stages": ", ".join(stages)}
        for (name, value, origin), stages in entries.items()
    ]
    known = {origin: place for place, origin in enumerate(ORIGINS)}
    return sorted(rows, key=lambda row: (known.get(row["origin"], 9), row["name"]))


def versions(found: Found) -> list[tuple[str, str, str]]:
    """Package, version, and the stages that ran with it."""
    entries: dict[tuple[str, str], list[str]] = {}
    for name, made in found.artifacts.items():
        for package, version in made.manifest.get("versions", {}).items():
            entries.setdefault((package, str(version)), []).append(MADE_BY[name])
    return [(*key, ", ".join(stages)) for key, stages in entries.items()]


def inputs(found: Found) -> list[tuple[str, str]]:
    """What each artifact was made from, and its own digest."""
    rows: list[tuple[str, str]] = []
    for name, made in found.artifacts.items():
        rows += [(f"{name}: {path}", value) for path, value in facts(made.manifest["inputs"])]
        if "seed" in made.manifest:
            rows.append((f"{name}: seed", plain(made.manifest["seed"])))
        rows.append((f"{name}: digest of its files", made.digest))
    return shortened(rows)


def files(found: Found) -> list[tuple[str, str, str]]:
    """Every file of an artifact, its size and sha256."""
    rows = [
        (f"{name}/{file}", size(entry["bytes"]), entry["sha256"])
        for name, made in found.artifacts.items()
        for file, entry in made.manifest["files"].items()
    ]
    return shortened(rows)


def shortened(rows: list[Any]) -> list[Any]:
    """The first rows, and how many more there are."""
    rows = [tuple(cut(str(cell), LONGEST) for cell in row) for row in rows]
    if len(rows) <= MOST_ROWS:
        return rows
    blank = [""] * (len(rows[0]) - 1)
    return [*rows[:MOST_ROWS], (f"and {len(rows) - MOST_ROWS:,} more", *blank)]


def stages(found: Found) -> Iterator[dict[str, Any]]:
    """Each artifact that a run may have: whether it is there, what it took, and what it is."""
    for name, stage in MADE_BY.items():
        if name in found.artifacts:
            manifest = found.artifacts[name].manifest
            device = manifest.get("device") or {}
            yield {
                "name": name, "stage": stage, "there": True, "why": found.stale.get(name, ""),
                "wall": duration(manifest["wall_seconds"]), "device": device.get("name", ""),
                "host": size(manifest["peak_host_bytes"]),
                "size": size(sum(entry["bytes"] for entry in manifest["files"].values())),
                "digest": found.artifacts[name].digest[:DIGITS],
            }  # fmt: skip
        else:
            why = found.broken.get(name, "not there")
            yield {"name": name, "stage": stage, "there": False, "why": why}


def attempts(found: Found) -> list[tuple[str, ...]]:
    """Every process that worked here: number, stage, beginning, how long, host, and how it ended."""
    rows: list[tuple[str, ...]] = []
    for place, record in enumerate(found.attempts):
        live = found.holder and record["end"] is None and place == len(found.attempts) - 1
        said = record["said"].partition(": ")[2] or record["said"]
        end = {0: "done", None: "at work" if live else "no word of its end"}.get(
            record["end"], f"exit {record['end']}: {said}"
        )
        begun = str(record.get("started", "")).replace("T", " ").replace("Z", "")
        host = str(record.get("host", ""))
        rows.append(
            (str(record["number"]), record["stage"], begun, duration(record["seconds"]), host, end)
        )
    return rows


def duration(seconds: float) -> str:
    """How long something took."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def size(count: float) -> str:
    """Bytes as people read them; powers of 1,000, as `report` prints."""
    for least, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= least:
            return f"{count / least:,.1f} {unit}"
    return f"{count:,.0f} bytes"


def megabytes(manifest: dict[str, Any]) -> str:
    """The size of an artifact, by its manifest."""
    return f"{sum(entry['bytes'] for entry in manifest['files'].values()) / 1e6:,.1f} MB"


def gib(count: float) -> str:
    """Bytes of memory; powers of 1,024, as the makers of GPUs have them."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**29 else f"{count / 2**20:,.0f} MiB"


def joined(parts: Sequence[str]) -> str:
    """Words with commas between those that there are."""
    return ", ".join(part for part in parts if part)
