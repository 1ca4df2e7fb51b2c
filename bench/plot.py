"""Draw `results/train.json` as bars: `python -m bench.plot` writes `bench/results/train.svg`.

Ours in colour, the peers in grey, one group a workload; a line marks what the ceiling allows. The
picture has no background, and its ink follows the reader's light or dark mode.
"""

import json
from pathlib import Path
from typing import Any

from bench.train_results import CEILING, START, TITLES

RESULTS = Path(__file__).parent / "results/train.json"
WIDTH, LEFT, RIGHT, BAR, GAP, TITLE = 760, 140, 150, 18, 6, 30
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; }
.small { font-size: 11px; fill: #57606a; }
.ours { fill: #0a7d4f; }
.peer { fill: #afb8c1; }
.limit { stroke: #cf222e; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .small { fill: #9198a1; }
  .ours { fill: #2ea86f; }
  .peer { fill: #59636e; }
  .limit { stroke: #ff7b72; }
}
"""


def draw(results: list[dict[str, Any]]) -> str:
    """An SVG of all results but those of the ceiling and of starting."""
    import drawsvg

    shown = [r for r in results if r["workload"] not in (CEILING, START)]
    workloads = list(dict.fromkeys(r["workload"] for r in shown))
    limits = [r["tokens_per_second"] / r["share_of_ceiling"] for r in shown if _share(r)]
    scale = (WIDTH - LEFT - RIGHT) / max([r["tokens_per_second"] for r in shown] + limits)
    height = len(workloads) * (TITLE + GAP) + len(shown) * (BAR + GAP) + 24
    picture = drawsvg.Drawing(WIDTH, height)
    picture.append_css(STYLE)
    y = 0.0
    for workload in workloads:
        y += TITLE
        picture.append(drawsvg.Text(TITLES[workload], 13, 0, y - 10, class_="title"))
        for result in (r for r in shown if r["workload"] == workload):
            y = _bar(picture, drawsvg, result, y, scale)
        y += GAP
    gpu = shown[0]["hardware"]["gpu"]
    note = f"Tokens a second, and peak memory. Red: the ceiling. {gpu}, {shown[0]['date']}"
    picture.append(drawsvg.Text(note, 11, 0, y + 14, class_="small"))
    return str(picture.as_svg())


def _share(result: dict[str, Any]) -> float:
    return float(result.get("share_of_ceiling", 0))


def _bar(picture: Any, drawsvg: Any, result: dict[str, Any], y: float, scale: float) -> float:
    """One system's bar; where the next one begins."""
    speed, middle = result["tokens_per_second"], y + BAR - 5
    kind = "ours" if result["system"].startswith("lora-stages") else "peer"
    name = drawsvg.Text(result["system"], 13, LEFT - 8, middle, text_anchor="end")
    picture.append(name)
    picture.append(drawsvg.Rectangle(LEFT, y, speed * scale, BAR, class_=kind))
    if _share(result):
        limit = LEFT + speed / _share(result) * scale
        picture.append(drawsvg.Line(limit, y, limit, y + BAR, class_="limit"))
    for said, x in ((f"{speed / 1000:.1f}k", WIDTH - 80), (f"{result['peak_gib']:.1f} GiB", WIDTH)):
        picture.append(drawsvg.Text(said, 13, x, middle, text_anchor="end"))
    return y + BAR + GAP


if __name__ == "__main__":
    RESULTS.with_suffix(".svg").write_text(draw(json.loads(RESULTS.read_text())) + "\n")
