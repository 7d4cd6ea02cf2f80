#!/usr/bin/env python3
"""Draws measurements: JSON results in, self-contained SVG figures out. Needs nothing but Python.

    bench/plot.py [--out FOLDER] [RESULT.json ...]

Takes what `perk bench decode --json`, bench/peers/transformers_decode.py and bench/stages.py write (an object, a list,
or an object a line), by default all of bench/results/; results of other kinds are left out. Makes, for every device,

    ceiling.svg   what share of the read ceiling a decode step reaches, by shape, batch and context
    steps.svg     a step's time beside its floor, the time of reading weights and KV alone
    stages-*.svg  where a step's time goes, stage by stage

and prints the names. Of results for the same thing, the latest counts. Exit codes: 0 something was drawn, 1 nothing.
"""
import argparse
import json
import pathlib
import re
import sys
from xml.sax.saxutils import escape

ROOT = pathlib.Path(__file__).resolve().parents[1]

# ---- results ----


def objects(path):
    """The JSON objects of a file; {} stands for what is none."""
    text = path.read_text()
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = [json.loads(line) for line in text.splitlines() if line.strip()]
    return [item if isinstance(item, dict) else {} for item in (found if isinstance(found, list) else [found])]


def device_of(result):
    return result.get("device") or result.get("start", {}).get("device") or "unknown device"


def as_title(name):
    """qwen3-8b is Qwen3-8B."""
    return re.sub(r"(?<=[\d.])b\b", "B", name[:1].upper() + name[1:])


def model_name(result):
    path = pathlib.PurePath(result.get("model", "?"))
    return as_title(path.parent.name if path.name == "config.json" else path.name)


def what_it_is(result):
    """What two results have in common when the later one replaces the earlier one."""
    return (device_of(result), result.get("peer", ""), model_name(result), result["batch"], result["context"],
            result.get("max_batched_tokens", result["batch"]), bool(result.get("portable")))


def decode_results(results):
    """The latest of each kind that has a time, smallest model first; peers come right after perk."""
    latest = {}
    for result in sorted(results, key=lambda r: r.get("date", "")):
        if result.get("what") == "decode" and "step_ms" in result:
            latest[what_it_is(result)] = result
    sizes = {}
    for result in latest.values():
        name = model_name(result)
        sizes[name] = max(sizes.get(name, 0), result.get("weight_bytes", 0))
    return sorted(latest.values(), key=lambda r: (sizes[model_name(r)], model_name(r), r["batch"], r["context"],
                                                  r.get("peer", ""), bool(r.get("portable"))))


def with_floors(results):
    """Peers do not measure the ceiling: theirs is that of perk's results on the same device."""
    ceilings = [r["read_ceiling_bytes_per_s"] for r in results if r.get("read_ceiling_bytes_per_s")]
    ceiling = sorted(ceilings)[len(ceilings) // 2] if ceilings else 0
    drawn = []
    for result in results:
        floor = result.get("floor_ms")
        if floor is None and ceiling:
            floor = (result["weight_bytes"] + result["kv_bytes"]) / ceiling * 1e3
        if floor is not None:
            drawn.append(dict(result, floor_ms=floor))
    return drawn


def label(result, contexts):
    parts = [model_name(result), f"batch {result['batch']}"]
    if contexts > 1:
        parts.append(f"context {result['context']:,}")
    if result.get("max_batched_tokens", result["batch"]) != result["batch"]:
        parts.append(f"built for {result['max_batched_tokens']}")
    if result.get("portable"):
        parts.append("portable")
    if result.get("peer"):
        parts.append(result["peer"])
    return ", ".join(parts)


# ---- drawing ----

INK, MUTED, GRID, LINE = "#1b1f24", "#57606a", "#e3e6ea", "#b3261e"
OURS, OURS_LIGHT, THEIRS, THEIRS_LIGHT = "#1f5fa8", "#a9c8ea", "#6b7280", "#cfd4da"
FONT, SMALL, CHARACTER = 13, 12, 0.60  # pixels; a character's width, in parts of the font's size, at most
ROW, BAR, MARGIN, PLOT = 26, 16, 20, 520


def width_of(text, size=FONT):
    return len(text) * size * CHARACTER


class Svg:
    """Shapes in the order in which they are drawn, on a white ground, so that dark pages can show them, too."""

    def __init__(self, width, height):
        self.width, self.height, self.parts = round(width), round(height), []

    def rect(self, x, y, width, height, color):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" '
                          f'fill="{color}"/>')

    def line(self, x1, y1, x2, y2, color, width=1.0):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" '
                          f'stroke-width="{width}"/>')

    def text(self, x, y, text, size=FONT, anchor="start", color=INK, weight="normal"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}" '
                          f'font-weight="{weight}">{escape(text)}</text>')

    def __str__(self):
        head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}" font-family="Helvetica, Arial, sans-serif">')
        return "\n".join([head, f'<rect width="{self.width}" height="{self.height}" fill="#ffffff"/>', *self.parts,
                          "</svg>", ""])


def nice_step(greatest, parts=6):
    """A round number, of which about `parts` make up `greatest`."""
    step = 1.0
    while step * parts < greatest:
        step *= 10
    while step * parts > greatest * 10:
        step /= 10
    return next(step * part for part in (0.1, 0.2, 0.5, 1.0) if step * part * parts >= greatest * 0.999)


class Bars:
    """Rows of labelled horizontal bars over one axis. A row: (label, [(value, color), ...], text to the right of the
    plot, where no line crosses it)."""

    def __init__(self, rows, unit, greatest=0.0):
        self.rows, self.unit = rows, unit
        totals = [sum(value for value, _ in bars) for _, bars, _ in rows]
        self.step = nice_step(max([greatest, *totals]))
        count = -(-max([greatest, *totals]) // self.step)
        self.end = count * self.step
        self.left = max(width_of(name) for name, _, _ in rows) + 12
        self.right = max(width_of(text, SMALL) for _, _, text in rows) + 16
        self.width = MARGIN * 2 + self.left + PLOT + self.right
        self.height = len(rows) * ROW + 44

    def place(self, value):
        return MARGIN + self.left + PLOT * value / self.end

    def draw(self, svg, top):
        bottom, tick = top + len(self.rows) * ROW, 0
        while tick * self.step <= self.end * 1.0001:
            value = tick * self.step
            svg.line(self.place(value), top - 4, self.place(value), bottom, GRID)
            svg.text(self.place(value), bottom + 16, f"{value:g}", SMALL, "middle", MUTED)
            tick += 1
        svg.text(self.place(self.end / 2), bottom + 34, self.unit, SMALL, "middle", MUTED)
        for index, (name, bars, text) in enumerate(self.rows):
            y, begin = top + index * ROW, 0.0
            svg.text(MARGIN + self.left - 10, y + ROW / 2 + 2, name, FONT, "end")
            for value, color in bars:
                svg.rect(self.place(begin), y + (ROW - BAR) / 2 - 3, self.place(begin + value) - self.place(begin), BAR,
                         color)
                begin += value
            svg.text(self.place(self.end) + 12, y + ROW / 2 + 2, text, SMALL, color=MUTED)


def heading(svg, title, subtitle):
    svg.text(MARGIN, 30, title, 17, weight="bold")
    svg.text(MARGIN, 50, subtitle, SMALL, color=MUTED)


def legend(svg, y, entries):
    x = MARGIN
    for color, text in entries:
        svg.rect(x, y - 10, 12, 12, color)
        svg.text(x + 18, y, text, SMALL)
        x += 18 + width_of(text, SMALL) + 22


def figure(title, subtitle, entries, bars):
    """An Svg that has room for all of it, and where its bars begin."""
    texts = [width_of(title, 17), width_of(subtitle, SMALL),
             sum(40 + width_of(text, SMALL) for _, text in entries)]
    top = 92 if entries else 72
    svg = Svg(max(bars.width, MARGIN * 2 + max(texts)), top + bars.height)
    heading(svg, title, subtitle)
    legend(svg, 74, entries)
    return svg, top


# ---- the figures ----


def contexts_of(results):
    return sorted({result["context"] for result in results})


def subtitle_of(results, device):
    contexts = contexts_of(results)
    dates = sorted(result["date"][:10] for result in results if result.get("date"))
    parts = [device, f"context {contexts[0]:,}" if len(contexts) == 1 else ""]
    if dates:
        parts.append(dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}")
    return ", ".join(part for part in parts if part)


def draw_ceiling(results, device):
    contexts, rows = len(contexts_of(results)), []
    for result in results:
        share = 100 * result["floor_ms"] / result["step_ms"]
        rows.append((label(result, contexts), [(share, THEIRS if result.get("peer") else OURS)],
                     f"{share:.0f} %, {result['step_ms']:.3f} ms"))
    bars = Bars(rows, "percent of the read ceiling", 100)
    entries = [(OURS, "perk")] + ([(THEIRS, "others")] if any(r.get("peer") for r in results) else [])
    svg, top = figure("A decode step against the read ceiling", subtitle_of(results, device),
                      entries + [(LINE, "the ceiling: reading weights and KV, and nothing else")], bars)
    bars.draw(svg, top)
    svg.line(bars.place(100), top - 8, bars.place(100), top + len(rows) * ROW, LINE, 2)
    return svg


def draw_steps(results, device):
    contexts, rows = len(contexts_of(results)), []
    for result in results:
        floor, step = result["floor_ms"], result["step_ms"]
        dark, light = (THEIRS, THEIRS_LIGHT) if result.get("peer") else (OURS, OURS_LIGHT)
        spread = (f" ({result['step_ms_p10']:.3f} to {result['step_ms_p90']:.3f})" if "step_ms_p90" in result else "")
        rows.append((label(result, contexts), [(min(floor, step), dark), (max(step - floor, 0), light)],
                     f"{step:.3f} ms{spread}, floor {floor:.3f}"))
    bars = Bars(rows, "milliseconds a step")
    entries = [(OURS, "floor: reading weights and KV"), (OURS_LIGHT, "the rest of perk's step")]
    if any(result.get("peer") for result in results):
        entries += [(THEIRS, "floor of others"), (THEIRS_LIGHT, "the rest of theirs")]
    svg, top = figure("A decode step beside its floor", subtitle_of(results, device), entries, bars)
    bars.draw(svg, top)
    return svg


def stage_panels(result):
    """(title, [(stage, count, microseconds in all)]) of every shape in the result."""
    columns = result.get("columns", [])
    if not {"stage", "count", "in_all"} <= set(columns):
        return []
    name, count, total = (columns.index(column) for column in ("stage", "count", "in_all"))
    return [(key, [(row[name], row[count], row[total]) for row in rows]) for key, rows in result.items()
            if isinstance(rows, list) and rows and isinstance(rows[0], list)]


def draw_stages(result):
    panels = stage_panels(result)
    drawn = []
    for title, stages in panels:
        whole = sum(total for _, _, total in stages)
        drawn.append((title, Bars([(stage, [(total, OURS)], f"{total:.1f} us, {100 * total / whole:.0f} %" +
                                    (f", {count} x {total / count:.2f}" if count > 1 else ""))
                                   for stage, count, total in stages], "microseconds of a step, all layers together")))
    left = max(bars.left for _, bars in drawn)
    right = max(bars.right for _, bars in drawn)
    title, subtitle = "Where a decode step's time goes", f"{device_of(result)}, {result.get('date', '')[:10]}"
    widest = max([width_of(title, 17), *(width_of(name) for name, _ in drawn)])
    svg = Svg(MARGIN * 2 + max(left + PLOT + right, widest), 70 + sum(bars.height + 40 for _, bars in drawn))
    heading(svg, title, subtitle)
    top = 88
    for name, bars in drawn:
        bars.left = left
        svg.text(MARGIN, top, as_title(name), FONT, weight="bold")
        bars.draw(svg, top + 16)
        top += bars.height + 40
    return svg


# ---- files ----


def slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def draw_all(files):
    """Figures by file name."""
    results = [(path, result) for path in files for result in objects(path)]
    decodes = decode_results([result for _, result in results])
    devices = sorted({device_of(result) for result in decodes})
    figures = {}
    for device in devices:
        drawn = with_floors([result for result in decodes if device_of(result) == device])
        suffix = f"-{slug(device)}" if len(devices) > 1 else ""
        if drawn:
            figures[f"ceiling{suffix}.svg"] = draw_ceiling(drawn, device)
            figures[f"steps{suffix}.svg"] = draw_steps(drawn, device)
    for path, result in results:
        if result.get("what") == "stages" and stage_panels(result):
            figures[f"stages-{slug(path.stem.removeprefix('stages-'))}.svg"] = draw_stages(result)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(ROOT / "bench" / "plots"), help="the folder; bench/plots")
    parser.add_argument("results", nargs="*", help="JSON files; bench/results/*.json")
    args = parser.parse_args()
    files = [pathlib.Path(name) for name in args.results] or sorted((ROOT / "bench" / "results").glob("*.json"))
    figures = draw_all(files)
    folder = pathlib.Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in figures.items():
        (folder / name).write_text(str(svg))
        print(folder / name)
    return 0 if figures else 1


if __name__ == "__main__":
    sys.exit(main())
