#!/usr/bin/env python3
"""bench/plot.py and bench/stages.py: the committed results, and made-up ones, give figures that are valid XML, in which
no text leaves the figure or lies on another, and whose bars are as long as they say. Needs nothing but Python."""
import json
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"
sys.path.insert(0, str(ROOT / "bench"))

import plot  # noqa: E402
import stages  # noqa: E402


def decode(**changes):
    result = dict(what="decode", model="bench/configs/qwen3-8b", device="A GPU", date="2026-01-02T00:00:00Z", batch=1,
                  context=512, step_ms=2.0, step_ms_p10=1.9, step_ms_p90=2.1, weight_bytes=10**9, kv_bytes=0,
                  read_ceiling_bytes_per_s=1e12, floor_ms=1.0)
    result.update(changes)
    return {key: value for key, value in result.items() if value is not None}


def peer(**changes):
    return decode(peer="transformers, graph <&>", floor_ms=None, read_ceiling_bytes_per_s=None, **changes)


def box(element):
    """Left, top, right, bottom of a text, wider than it is drawn."""
    size = float(element.get("font-size"))
    width = plot.width_of(element.text, size)
    left = float(element.get("x")) - {"start": 0, "middle": width / 2, "end": width}[element.get("text-anchor")]
    bottom = float(element.get("y"))
    return left, bottom - size * 0.8, left + width, bottom + size * 0.2


def check_figure(name, svg):
    root = ElementTree.fromstring(str(svg))
    assert root.tag == SVG + "svg", name
    assert root[0].get("fill") == "#ffffff" and float(root[0].get("width")) == svg.width, name
    texts = [(element.text, box(element)) for element in root.iter(SVG + "text")]
    for text, (left, top, right, bottom) in texts:
        assert left >= 0 and top >= 0 and right <= svg.width and bottom <= svg.height, f"{name}: {text} is cut off"
    for index, (text, a) in enumerate(texts):
        for other, b in texts[:index]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{name}: {text} lies on {other}"
    return [text for text, _ in texts], list(root.iter(SVG + "rect"))


def draw(folder, name, *results):
    path = pathlib.Path(folder) / name
    path.write_text("\n".join(json.dumps(result) for result in results))
    return plot.draw_all([path])


def test_committed(folder):
    done = subprocess.run([sys.executable, ROOT / "bench" / "plot.py", "--out", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = [pathlib.Path(line) for line in done.stdout.split("\n") if line]
    assert {"ceiling.svg", "steps.svg", "stages-h100.svg"} <= {path.name for path in made}, made
    figures = plot.draw_all(sorted((ROOT / "bench" / "results").glob("*.json")))
    for path in made:
        assert path.read_text() == str(figures[path.name]), path
        texts, _ = check_figure(path.name, figures[path.name])
        assert "NVIDIA H100" in " ".join(texts), path


def test_figures(folder):
    figures = draw(folder, "a.json", decode(), decode(batch=32, context=16384, step_ms=123.456), peer(),
                   decode(step_ms=4.0, date="2026-01-01T00:00:00Z"), peer(batch=2, step_ms=None, error="no"),
                   {"what": "startup"})
    assert set(figures) == {"ceiling.svg", "steps.svg"}, set(figures)
    texts, bars = check_figure("ceiling", figures["ceiling.svg"])
    assert "50 %, 2.000 ms" in texts and "Qwen3-8B, batch 32, context 16,384" in texts, texts
    assert not any("4.000" in text for text in texts), "the later result counts"
    ours = [bar for bar in bars if bar.get("fill") == plot.OURS and float(bar.get("height")) == plot.BAR]
    assert [round(float(bar.get("width")) / plot.PLOT, 2) for bar in ours] == [0.5, 0.01], "half of the ceiling"
    texts, bars = check_figure("steps", figures["steps.svg"])
    assert any("transformers, graph <&>" in text for text in texts), texts
    lengths = [float(bar.get("width")) for bar in bars if bar.get("fill") in (plot.OURS, plot.OURS_LIGHT)
               and float(bar.get("height")) == plot.BAR]
    assert abs(lengths[0] - lengths[1]) <= 0.11, "floor and rest are equal here"


def test_devices(folder):
    figures = draw(folder, "b.json", decode(), decode(device="B/1"))
    assert set(figures) == {"ceiling-a-gpu.svg", "steps-a-gpu.svg", "ceiling-b-1.svg", "steps-b-1.svg"}, set(figures)
    for name, svg in figures.items():
        check_figure(name, svg)
    assert draw(folder, "c.json", peer()) == {}, "there is no ceiling to stand beside"


PROFILE = """\
models/tiny  batch 2  context 40  A GPU  portable
  step, profiled     0.015 ms, on the device 1.000 ms; median of 5
  step, plain        0.014 ms, on the device 1.000 ms: profiling costs 7.14 %, on the device 0.00 %
  stage                                count    in all    chain expected      run  longest     wait   us
  embedding                                1       2.4     2.40     3.10     1.88     1.96     0.40
  layers.*.qkv                             6      17.7     2.96    28.80     2.14     2.31    -0.01
"""


def test_stages(folder):
    result = stages.read((PROFILE + PROFILE.replace("batch 2", "batch 4")).split("\n"))
    assert result["device"] == "A GPU" and len(plot.stage_panels(result)) == 2, result
    title, rows = plot.stage_panels(result)[0]
    assert title == "tiny, batch 2, context 40, portable, step 0.015 ms", title
    assert rows == [("embedding", 1, 2.4), ("layers.*.qkv", 6, 17.7)], rows
    figures = draw(folder, "stages-x.json", result)
    texts, _ = check_figure("stages", figures["stages-x.svg"])
    assert "17.7 us, 88 %, 6 x 2.95" in texts, texts
    assert stages.read(["nothing of the kind"]) is None


def main():
    for test in (test_committed, test_figures, test_devices, test_stages):
        with tempfile.TemporaryDirectory() as folder:
            test(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
