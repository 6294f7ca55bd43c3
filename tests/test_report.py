"""The page about a run: it holds everything by itself, shows every scalar, escapes text, and says what is missing.

Where a Chromium is installed, it opens the page and says what a reader on a phone and at a desk would see.
"""

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from benchmark.curves import centred_mean, nice_ticks, scalar_curves
from benchmark.report import main, plot_curves, read_run, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSER_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--allow-file-access-from-files", "--window-size=1400,900"),  # the probe reads a frame that is another file
]
HOSTILE = "</script><script>alert('x')</script>"
LOG = [
    {
        "step": step,
        "epoch": step / 8,
        "reward": 0.25 * step,
        "reward_std": 0.1,
        "rewards/clip/mean": 0.2 + 0.01 * step,
        "rewards/judge/mean": None if step == 3 else 0.5 + 0.1 * step,
        "truth/mean": 0.4 + 0.02 * step,
        "kl": float("nan") if step == 2 else 0.001 * step,
        "entropy": 5.0 - 0.1 * step,
        "grad_norm": float("inf") if step == 4 else 1.5,
        "speed/images_per_s": 40.0 + step,
        "text/<i>odd</i>": 1.0 * step,
    }
    for step in range(1, 9)
] + [{"step": 8, "train_runtime": 12.5, "note": "not a number"}]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "toy <run>"
    (folder / "checkpoint-8").mkdir(parents=True)
    (folder / "checkpoint-4").mkdir()
    (folder / "samples").mkdir()
    state = {"global_step": 8, "log_history": LOG}
    (folder / "checkpoint-8" / "trainer_state.json").write_text(json.dumps(state))
    (folder / "checkpoint-4" / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": LOG[:4]}))
    for step in (0, 100, 20):
        Image.new("RGB", (24, 12), (step, 0, 0)).save(folder / "samples" / f"step-{step:06d}.png")
    Image.new("RGB", (700, 8), "green").save(folder / "before_after.png")
    summary = {"reward_before": 0.25, "reward_after": 1.75, "kl": 0.008, "steps": 8, "seconds_train": 252.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    settings = {
        "prompt": HOSTILE,
        "guidance_scale": 2.0,
        "command": ["train.py", "a b"],
        "judge": {"api_key": "sk-42"},
        "versions": {"torch": "9.9.9"},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def ordinary_run(tmp_path: Path) -> Path:
    """What train_c2i.py alone leaves: no summary.json, no before_after.png, but a log and grids of real size."""
    folder = tmp_path / "ordinary"
    (folder / "samples").mkdir(parents=True)
    log = [
        {
            "step": step,
            "reward": 1.0 * step,
            "rewards/clip/mean": 2.0 * step,
            "rewards/clip/std": 0.1,
            "kl": 0.5,
            "entropy": 100.0 - step,
            "sampling/logp_difference/max": 1.2345e-05 * step,
        }
        for step in range(1, 21)
    ] + [{"step": 20, "train_runtime": 252.0, "a_scalar_whose_name_has_no_place_to_break": 1.0}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": log}))
    (folder / "settings.json").write_text(json.dumps({"command": ["train_c2i.py", "--output_dir", "/x" * 200]}))
    for step in (0, 10, 20):
        Image.new("RGB", (804, 540), (10 * step, 0, 0)).save(folder / "samples" / f"step-{step:06d}.png")
    return folder


class _Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees; <wbr> does not divide a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not data.strip():
            return
        if self.tags[-1][0] == "wbr":
            self.text[-1] += data.strip()
        elif self.tags[-1][0] not in ("script", "style"):
            self.text.append(data.strip())


def _read(path: Path) -> _Page:
    return _Page(path.read_text(encoding="utf-8"))


def test_the_page_loads_nothing_from_outside(run_dir):
    path = write_report(run_dir)
    page = _read(path)
    loads = [value for _, attrs in page.tags for key in ("src", "href", "action", "data") if (value := attrs.get(key))]
    assert len(loads) == 5  # favicon, before and after, three grids
    assert all(load.startswith("data:") for load in loads)
    assert not re.search(r"@import|url\(|https?://|fetch\(|import\(", path.read_text(encoding="utf-8"))
    assert {"link", "script", "style", "img", "svg"} <= {tag for tag, _ in page.tags}


def test_every_scalar_of_the_log_appears_by_name_and_every_repeated_one_has_a_curve(run_dir):
    page = _read(write_report(run_dir))
    names = {name for entry in LOG for name in entry} - {"step", "epoch", "note"}
    assert names <= set(page.text)
    charts = [attrs["aria-label"].split(":")[0] for tag, attrs in page.tags if tag == "svg"]
    assert sorted(charts) == sorted(names - {"train_runtime"})


def test_points_carry_the_logged_values_and_skip_those_that_are_none_or_not_finite(run_dir):
    page = _read(write_report(run_dir))
    figures = [json.loads(attrs["data-points"]) for _, attrs in page.tags if "data-points" in attrs]
    labels = [[label for _, _, label in points] for points in figures]
    assert [f"step {step}: {0.25 * step:g}" for step in range(1, 9)] in labels  # reward
    judge = ["step 1: 0.6", "step 2: 0.7", "step 4: 0.9", "step 5: 1", "step 6: 1.1", "step 7: 1.2", "step 8: 1.3"]
    assert judge in labels  # step 3 was None
    assert all(math.isfinite(x) and math.isfinite(y) for points in figures for x, y, _ in points)
    assert "1 of 8 values are missing or not finite." in page.text


def test_grids_are_in_step_order_and_embedded_unchanged(run_dir):
    page = _read(write_report(run_dir))
    assert [attrs["data-label"] for tag, attrs in page.tags if "data-label" in attrs] == [
        "step 0",
        "step 20",
        "step 100",
    ]
    grids = [attrs for tag, attrs in page.tags if tag == "img" and attrs["alt"].startswith("Grid")]
    pictures = [base64.b64decode(attrs["src"].partition("base64,")[2]) for attrs in grids]
    assert pictures == [(run_dir / "samples" / f"step-{step:06d}.png").read_bytes() for step in (0, 20, 100)]
    slider = next(attrs for tag, attrs in page.tags if tag == "input")
    assert (slider["min"], slider["max"], slider["type"]) == ("0", "2", "range")


def test_text_of_the_run_is_escaped_and_keys_are_hidden(run_dir):
    source = write_report(run_dir).read_text(encoding="utf-8")
    page = _Page(source)
    assert HOSTILE not in source and html.escape(HOSTILE) in source
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not any(tag in ("run", "i") for tag, _ in page.tags)
    assert "AR-GRPO run: toy <run>" in page.text
    assert "sk-42" not in source and "(hidden)" in page.text


def test_numbers_settings_and_versions_are_spelled_out(run_dir):
    text = _read(write_report(run_dir)).text
    assert "0.25 → 1.75" in text and "+1.5" in text
    assert text[text.index("time, train") + 1] == "4 min 12 s"
    assert text[text.index("guidance_scale") + 1] == "2.0"
    assert text[text.index("command") + 1] == "train.py 'a b'"
    assert text[text.index("torch") + 1] == "9.9.9" and "As the run wrote them down." in text


def test_what_the_run_folder_lacks_is_said(tmp_path):
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    (tmp_path / "settings.json").write_text('{"half": ')
    page = _read(write_report(tmp_path, tmp_path / "elsewhere" / "page.html"))
    notices = [attrs.get("class") for tag, attrs in page.tags if attrs.get("class") == "missing"]
    assert len(notices) == 4
    text = " ".join(page.text)
    assert "neither the folder nor a checkpoint-*/ in it has a trainer_state.json" in text
    assert "no samples/step-000000.png" in text and "no before_after.png" in text
    assert "settings.json cannot be read" in text
    assert "Read when this page was written" in text


def test_an_ordinary_run_shows_its_first_and_last_grid_and_no_warning(ordinary_run):
    page = _read(write_report(ordinary_run))
    assert not [attrs for _, attrs in page.tags if attrs.get("class") == "missing"]
    shown = [attrs for tag, attrs in page.tags if tag == "img" and attrs["alt"].startswith("The fixed prompts")]
    assert [attrs["alt"] for attrs in shown] == ["The fixed prompts at step 0", "The fixed prompts at step 20"]
    assert [base64.b64decode(attrs["src"].partition("base64,")[2]) for attrs in shown] == [
        (ordinary_run / "samples" / f"step-{step:06d}.png").read_bytes() for step in (0, 20)
    ]
    section = page.text[page.text.index("Before and after") : page.text.index("Samples over time")]
    assert section[-2:] == ["step 0", "step 20"]


def test_without_a_summary_the_numbers_on_top_are_those_of_the_log(ordinary_run):
    text = _read(write_report(ordinary_run)).text
    # 20 entries: the last tenth is steps 19 and 20. By hand: (19 + 20) / 2, twice that, (81 + 80) / 2
    note = "Numbers of the training log: first entry → mean of the last tenth of the entries."
    tiles = text[text.index("reward") : text.index(note)]
    assert tiles == [
        *("reward", "1 → 19.5", "+18.5"),
        *("rewards/clip/mean", "2 → 39", "+37"),
        *("kl", "0.5 → 0.5", "+0"),
        *("entropy", "99 → 80.5", "-18.5"),
        *("steps", "20"),
        *("time, train", "4 min 12 s"),
    ]


def test_a_summary_comes_before_the_log_and_a_torn_one_is_said(run_dir):
    page = _read(write_report(run_dir))
    assert not any("Numbers of the training log" in text for text in page.text)
    assert not any((attrs.get("alt") or "").startswith("The fixed prompts") for _, attrs in page.tags)
    (run_dir / "summary.json").write_text('{"reward_before": ')
    text = " ".join(_read(write_report(run_dir)).text)
    assert "summary.json cannot be read" in text and "0.25 → 2" in text  # reward: first and last of LOG


def test_one_grid_is_no_before_and_after(ordinary_run):
    for step in (0, 10):
        (ordinary_run / "samples" / f"step-{step:06d}.png").unlink()
    text = " ".join(_read(write_report(ordinary_run)).text)
    assert "no before_after.png and no two grids" in text and "The first and the last grid" not in text


def test_the_last_value_stands_beside_the_name(ordinary_run):
    text = _read(write_report(ordinary_run)).text
    start = text.index("scalar")
    columns = ["scalar", "last", "first", "lowest", "highest", "mean, last tenth", "entries"]
    assert text[start : start + 14] == [*columns, *("reward", "20", "1", "1", "20", "19.5", "20")]


def test_a_broken_picture_is_said_and_the_rest_is_shown(run_dir):
    (run_dir / "samples" / "step-000020.png").write_bytes(b"not a picture")
    text = " ".join(_read(write_report(run_dir)).text)
    assert "step-000020.png cannot be read" in text and "0.25 → 1.75" in text


def test_a_heavy_picture_is_embedded_smaller(run_dir):
    noise = Image.effect_noise((2000, 500), 90).convert("RGB")
    noise.save(run_dir / "before_after.png")
    page = _read(write_report(run_dir))
    source = next(attrs["src"] for tag, attrs in page.tags if tag == "img" and attrs["alt"].startswith("The same"))
    with Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) as embedded:
        assert (embedded.format, embedded.size) == ("JPEG", (1600, 400))


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"is no run folder.*--output_dir"):
        write_report(tmp_path)


def test_the_log_that_reaches_further_wins(run_dir):
    assert read_run(run_dir).log_file == run_dir / "checkpoint-8" / "trainer_state.json"
    (run_dir / "trainer_state.json").write_text(json.dumps({"global_step": 9, "log_history": LOG[:1]}))
    run = read_run(run_dir)
    assert run.log_file == run_dir / "trainer_state.json" and len(run.log_history) == 1


def test_curves_png_is_small_and_not_blank(tmp_path):
    noisy = [
        {"step": s, **{f"rewards/r{i}/mean": math.sin(s * (i + 1.37)) + s / 300 for i in range(12)}, "kl": s * 1e-4}
        for s in range(300)
    ]
    path = plot_curves(noisy, tmp_path / "curves.png")
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1000
        assert len(image.convert("RGB").getcolors(100)) > 10


def test_curves_without_anything_to_draw_say_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match="logging_steps"):
        plot_curves([{"step": 1, "reward": 0.5}], tmp_path / "curves.png")


def test_scalars_are_sorted_by_step_and_gaps_are_nan():
    log = [{"step": 2, "kl": None, "loss": "0.5"}, {"step": 1, "kl": 3, "flag": True, "name": "a"}]
    curves = scalar_curves(log)
    assert set(curves) == {"kl", "loss"}
    assert curves["kl"][0] == (1.0, 3.0) and curves["kl"][1][0] == 2.0 and math.isnan(curves["kl"][1][1])
    assert curves["loss"] == [(2.0, 0.5)]


def test_smoothing_is_a_centred_mean_over_a_twentieth():
    # 80 entries: two to either side; by hand (0+1+2)/3, (10+9+11+12)/4 without the nan at 8, (77+78+79)/3
    values = [float(i) if i != 8 else math.nan for i in range(80)]
    mean = centred_mean(values)
    assert (mean[0], mean[10], mean[79]) == (1.0, 10.5, 78.0)
    assert centred_mean([3.0, 1.0]) == [3.0, 1.0]


def test_ticks_are_round_numbers_inside_the_range():
    assert nice_ticks(0, 200) == [0, 50, 100, 150, 200]
    assert nice_ticks(0.21, 0.39) == [0.25, 0.3, 0.35]
    assert nice_ticks(7, 7) == [7]


def test_command_line_writes_page_and_picture(run_dir, tmp_path, capsys):
    main([str(run_dir), "--out", str(tmp_path / "p.html"), "--curves", str(tmp_path / "c.png")])
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "p.html"), str(tmp_path / "c.png")]
    assert sorted(p.suffix for p in tmp_path.iterdir() if p.is_file()) == [".html", ".png"]  # nothing partial is left
    with pytest.raises(SystemExit):
        main([str(tmp_path / "absent")])
    assert "is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--curves"])
def test_a_folder_is_no_file_to_write(run_dir, tmp_path, capsys, option):
    folder = tmp_path / "pages"
    folder.mkdir()
    with pytest.raises(SystemExit):
        main([str(run_dir), option, str(folder)])
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"{option} {folder} is a folder: give the file to write, like {folder}/" in last
    assert not any(folder.iterdir()) and not (run_dir / "report.html").exists()


def test_a_path_that_cannot_be_written_is_named_in_one_line(run_dir, capsys):
    with pytest.raises(SystemExit):
        main([str(run_dir), "--out", str(run_dir / "settings.json" / "page.html")])
    assert str(run_dir / "settings.json") in capsys.readouterr().err.splitlines()[-1]


def _open_in_browser(page: Path, width: int) -> dict:
    """What a browser finds on a page shown `width` pixels wide, every <details> open and the slider moved once around.

    The page lies in a frame of that width: the window of a headless Chromium is never narrower than 500 pixels.
    """
    frame = page.with_name("frame.html")
    frame.write_text(
        f'''<!doctype html><iframe style="border:0" width="{width}" height="844" src="{page.name}"></iframe><script>
        onload = () => {{
          const view = document.querySelector("iframe").contentWindow, page = view.document;
          const visible = (element) => element.getClientRects().length > 0;
          const box = (element) => element.getBoundingClientRect();
          page.querySelectorAll("details").forEach((details) => {{ details.open = true; }});
          const range = page.querySelector("input[type=range]"), slider = [];
          for (let value = 0; value <= Number(range.max); value++) {{
            range.value = value;
            range.dispatchEvent(new view.Event("input"));
            const grids = [...page.querySelectorAll(".frames figure")].filter(visible);
            slider.push([page.querySelector("output").textContent, ...grids.map((figure) => figure.dataset.label)]);
          }}
          const root = page.documentElement, table = page.querySelector("details table");
          const row = table.tBodies[0].rows[0], scroller = table.closest(".scroll");
          const lastColumn = box(row.cells[1]).right;
          scroller.scrollLeft = 1e6;
          document.body.dataset.found = JSON.stringify({{
            slider, width: view.innerWidth, page_width: root.scrollWidth, last_column: lastColumn,
            name_left: box(row.cells[0]).left - box(scroller).left, entries_right: box(row.cells[6]).right,
            scrolled: scroller.scrollLeft,
            pictures: [...page.querySelectorAll("img")].filter(visible).map((image) => box(image).width),
            pair_tops: [...page.querySelectorAll(".pair img")].map((image) => box(image).top),
            loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name),
          }});
        }};
        </script>''',
        encoding="utf-8",
    )
    profile = page.with_name(f"profile-{width}")
    command = [BROWSER, *BROWSER_FLAGS, f"--user-data-dir={profile}", "--dump-dom", frame.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = [attrs["data-found"] for _, attrs in _Page(done.stdout).tags if "data-found" in attrs]
    assert found, f"the page did not load, or the probe failed: {done.stderr[-2000:]}"
    return json.loads(found[0])


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
def test_on_a_phone_the_slider_works_and_only_boxes_scroll_sideways(ordinary_run, tmp_path):
    found = _open_in_browser(write_report(ordinary_run, tmp_path / "browser" / "page.html"), 390)
    assert found["slider"] == [[f"step {step}", f"step {step}"] for step in (0, 10, 20)]  # one grid, the one named
    assert found["width"] == 390 and found["page_width"] <= 390
    assert found["loaded"] == []
    assert len(found["pictures"]) == 3 and min(found["pictures"]) >= 640  # first, last, and one of the slider's
    first, last = found["pair_tops"]
    assert last > first + 400  # below each other: 804 x 540 pictures
    # Of the scalars a reader sees name and last value at once, and after scrolling still the name, and the last column
    assert found["last_column"] < 390 and found["scrolled"] > 0
    assert found["name_left"] == pytest.approx(1, abs=1) and found["entries_right"] < 390


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: apt-get install chromium")
def test_at_a_desk_the_first_and_the_last_grid_are_side_by_side(ordinary_run, tmp_path):
    found = _open_in_browser(write_report(ordinary_run, tmp_path / "browser" / "page.html"), 1280)
    first, last = found["pair_tops"]
    assert first == last
    assert found["width"] == 1280 and found["page_width"] <= 1280 and found["scrolled"] == 0
    assert found["loaded"] == []
