"""The report: what it says, what it draws, and that nothing in a run folder becomes more than text."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folders import STEPS, make_records, make_run, metrics
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dpg_cli.cli import main
from dpg_cli.evidence.effect import EffectVerdict, Reading
from dpg_cli.evidence.fluency.auc import Auc
from dpg_cli.evidence.fluency.judge import Fluency, Judged, Shown, Telling
from dpg_cli.evidence.fluency.nats import Comparison
from dpg_cli.evidence.verify import PatternReading, PatternVerdict
from dpg_cli.report import write_report
from dpg_cli.report.charts import MOST_POINTS, Chart, Line, thinned, tick_labels, ticks
from dpg_cli.report.curves import curves, measures
from dpg_cli.report.gather import gather
from dpg_cli.report.page import embedded, stock_comparison
from dpg_cli.report.samples import choose, extreme, pieces, shade, take
from dpg_cli.report.text import visible
from dpg_cli.runs.verdict import read_verdict, save_verdict

STYLE = Path(write_report.__code__.co_filename).with_name("style.css").read_text(encoding="utf-8")
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=hack()>\"' onclick=x {{7*7}} <!-- ]]> &amp; \x1b[31m\u202e"


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            if tag == "script":
                self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self.inside:
            self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.text += data


def read(folder: Any) -> Reader:
    return Reader(write_report(folder).read_text(encoding="utf-8"))


def check_structure(page: Reader) -> None:
    """Nothing that runs, loads or styles but our own two blocks."""
    assert len(page.scripts) == 2
    json.loads(page.scripts[0])
    assert [tag for tag, _ in page.tags if tag in ("iframe", "object", "embed", "base", "video", "audio")] == []
    for tag, attributes in page.tags:
        assert [name for name in attributes if name.startswith("on") or name == "style"] == [], tag
        for name in ("src", "href", "action", "srcset", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    policy = next(
        a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


def test_the_page_of_a_run(tmp_path: Path) -> None:
    page = read(make_run(tmp_path / "run"))
    check_structure(page)
    names = [tag for tag, _ in page.tags]
    assert names.count("h1") == 1
    assert names.count("h2") == 6
    assert (
        names.count("polyline") == 13
    )  # Φ, accuracy, std, two shares, entropy, KL, fluency, length, gradient, three stages
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    for text in (
        "Not verified yet: dpg verify",
        "pixel accuracy",
        "0.98",
        "0.51",
        "synthetic and made to steer",
        "2.13.0",
    ):
        assert text in page.text
    data = json.loads(page.scripts[0])
    assert len([row for row in data["rows"] if row["origin"] == "trained"]) == 120
    rewards = [row["reward"] for row in data["rows"] if row["origin"] == "trained"]
    assert rewards == sorted(rewards, reverse=True)


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    """In every place that a run's data reaches."""
    record = {
        "example_id": 1, "prompt": HOSTILE, "text": HOSTILE, "token_ids": [1], "input_ids": [1, 1],
        "reward": 1.0, "token_rewards": None,
    }  # fmt: skip
    rows = [{"step": number, "phi": 0.1 * number, HOSTILE: 2.0 + number} for number in range(3)]
    folder = make_run(
        tmp_path / "run", task=HOSTILE, effect=HOSTILE, records=[record], rows=rows, command=["dpg", HOSTILE]
    )
    info = json.loads(folder.info.read_text())
    info |= {
        "measures": {HOSTILE: 1.0},
        "versions": {HOSTILE: HOSTILE},
        "hardware": {"x": HOSTILE},
        "revision": HOSTILE,
    }
    info |= {"started": HOSTILE, "seconds": HOSTILE, "control": {HOSTILE: HOSTILE}}
    folder.info.write_text(json.dumps(info))
    reading = PatternReading(HOSTILE, 0.5, 1, 1)
    save_verdict(folder, PatternVerdict(HOSTILE, reading, reading))
    page = read(folder)
    check_structure(page)
    assert page.text.count("<img src=x onerror=hack()>") >= 15
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text
    row = json.loads(page.scripts[0])["rows"][0]
    assert row["prompt"] == row["pieces"][0][0] == HOSTILE.replace("\x1b", "\ufffd").replace("\u202e", "\ufffd")


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_is_safe_to_write(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert len(shown) == len(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in shown)


def test_embedded_json_has_nothing_of_html(tmp_path: Path) -> None:
    records = [{**record, "prompt": "</script>&lt;<!--\u2028é"} for record in make_records(3)]
    sample = gather(make_run(tmp_path / "run", records=records)).sample
    text = embedded(sample)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text)["rows"][0]["prompt"] == "</script>&lt;<!--\u2028é"


def verdict(payload: str | None) -> PatternVerdict:
    return PatternVerdict("HELLO", PatternReading(payload, 0.9, 120, 1), PatternReading(None, 0.51, 120, 1))


def test_the_verdict_and_its_age(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert read_verdict(folder) is None
    save_verdict(folder, verdict("HELLO"))
    page = read(folder)
    assert "✔ Verified" in page.text
    assert "read back by zxing-cpp" in page.text
    save_verdict(folder, verdict(None))
    page = read(folder)
    assert "✘ Not verified" in page.text
    assert "pixel accuracy 0.9000" in page.text
    # Other data than was verified: the verdict no longer counts.
    save_verdict(folder, verdict("HELLO"))
    table = pq.read_table(folder.dataset / "train.parquet")
    pq.write_table(table.slice(1), folder.dataset / "train.parquet")
    page = read(folder)
    assert "the verdict is of another dataset" in page.text
    assert "✔" not in page.text


def test_the_table_of_a_verdict_by_margins(tmp_path: Path) -> None:
    """Measures by name, the quarters as a range, what was before, what the saved target has: nothing nested."""
    folder = make_run(tmp_path / "run")
    reading = Reading({"phi": -3.0, "norm": 3.0}, (-3.25, -3.125, -3.0, -2.875), 8, 1, 64)
    control = Reading({"phi": -4.0, "norm": 4.0}, (-4.5, -4.0, -4.0, -4.0), 8, 1, 72)
    save_verdict(folder, EffectVerdict("a norm", {"phi": -5.0, "norm": 5.0}, reading, control, {"norm": 3.5}))
    assert stock_comparison(gather(folder)) == [
        ["Φ", "\u22123", "\u22124"],
        ["norm", "3", "4"],
        ["Φ after a quarter of the data", "\u22123.25 to \u22122.875", "\u22124.5 to \u22124"],
        ["examples", "8", "8"],
        ["optimiser steps", "1", "1"],
        ["tokens trained on", "64", "72"],
        ["Φ before fine-tuning", "\u22125", "\u22125"],
        ["norm before fine-tuning", "5", "5"],
        ["norm of target/ as saved", "3.5", "\u2013"],
    ]


def fluent(text: str = "a text") -> Fluency:
    telling = Telling("token and bigram counts", Auc(0.5123, 0.003), Auc(0.61, 0.02))
    example = Shown(7, "a prompt", text, {"starting generator": 3.25, "other": None})
    return Fluency(
        (32_768, 32_768),
        (Comparison("starting generator", 3.2146, 3.2033, 0.0113, 0.0021),),
        0.0087,
        (telling,),
        (example,) * 5,
        (replace(example, number=9),) * 5,
        ("a note",),
    )


def test_how_it_reads_beside_its_control(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    reading = PatternReading("HI", 1.0, 120, 1)
    save_verdict(folder, Judged(PatternVerdict("HI", reading, reading), fluent()))
    page = read(folder)
    check_structure(page)
    words = "".join(page.text.split())  # cells have no space between them
    for text in (
        "on 32,768 examples of each",
        "starting generator 3.2146 3.2033 +0.0113 ± 0.0021 1.0114",
        "token and bigram counts 0.5123 ± 0.0030 0.6100 ± 0.0200",
        "0.0087 nats likelier",
        "a note",
        "example 7 · nats a token: 3.2500 under starting generator, – under other Prompt a prompt a text",
    ):
        assert text.replace(" ", "") in words, text
    assert (words.count("example7·"), words.count("example9·")) == (5, 5)
    pq.write_table(pq.read_table(folder.dataset / "control.parquet").slice(1), folder.dataset / "control.parquet")
    assert "How it reads beside" not in read(folder).text


@pytest.mark.parametrize("damage", [
    "x", None, [], {"nats": 3, "telling": {}, "data": "x", "examples": [None]},
    {"nats": [None, {"reader": 3, "data": "x", "ratio": 1e400}], "telling": [{"example": 3, "many": {"value": True}}], "kl": "x",
     "data": [{"number": "x", "nats": [1], "text": 3}], "notes": [3], "examples": ["x", 2]},
], ids=["text", "nothing", "list", "kinds", "parts"])  # fmt: skip
def test_a_strange_judgement_makes_no_strange_page(damage: Any, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    reading = PatternReading("HI", 1.0, 120, 1)
    save_verdict(folder, Judged(PatternVerdict("HI", reading, reading), fluent(HOSTILE)))
    check_structure(read(folder))
    path = folder.path / "verify.json"
    kept = json.loads(path.read_text())
    kept["details"]["fluency"] = damage
    path.write_text(json.dumps(kept))
    check_structure(read(folder))


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", rows=[metrics(step) for step in range(7)])
    folder.info.unlink()
    for path in folder.dataset.iterdir():
        path.unlink()
    with folder.metrics.open("a") as file:
        file.write('{"step": 7, "ph')  # cut short by a crash
    page = read(folder)
    check_structure(page)
    assert f"7 of {STEPS} outer steps" in page.text
    assert "there is none yet" in page.text


def test_pieces_are_the_text(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", examples=30)
    sample = gather(folder).sample
    assert sample is not None
    table = {row["example_id"]: row for row in pq.read_table(folder.dataset / "train.parquet").to_pylist()}
    for row in sample.rows:
        record = table[row.number]
        assert "".join(piece.text for piece in row.pieces) == record["text"] + "<|endoftext|>"
        assert 5 < len(row.pieces) <= len(record["token_ids"])  # fewer where a letter is two tokens
        total = math.fsum(piece.reward for piece in row.pieces if piece.reward is not None)
        assert total == pytest.approx(
            record["reward"], abs=30 * 1e-8 * 2**-24
        )  # float32 in the file, 30 tokens of 1e-8


def test_bytes_of_one_character_are_one_piece() -> None:
    tokenizer = byte_tokenizer(decoders.ByteLevel())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "aé€ 😀."
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    rewards = [2.0**-number for number in range(len(ids))]
    found = pieces({"token_ids": ids, "token_rewards": rewards}, tokenizer.decode)
    assert [piece.text for piece in found] == ["a", "é", "€", " ", "😀", "."]
    assert found[1].reward == 2.0**-1 + 2.0**-2
    assert math.fsum(piece.reward for piece in found if piece.reward is not None) == math.fsum(rewards)


def byte_tokenizer(decoder: Any) -> Tokenizer:
    """A tokeniser without merges: each byte is a token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet if isinstance(decoder, decoders.ByteLevel) else [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.decoder = decoder
    return tokenizer


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.booleans())
def test_any_bytes_make_pieces_that_are_the_text(ids: list[int], fallback: bool) -> None:
    """Also bytes that are no text, for both kinds of decoders that make characters of bytes."""
    decode = byte_tokenizer(decoders.ByteFallback() if fallback else decoders.ByteLevel()).decode
    rewards = [2.0**-number for number in range(len(ids))]
    found = pieces({"token_ids": ids, "token_rewards": rewards, "text": "?"}, decode)
    if not fallback:
        assert "".join(piece.text for piece in found) == decode(ids)
    assert math.fsum(piece.reward or 0.0 for piece in found) == math.fsum(rewards)


def test_a_byte_that_is_no_character_stands_alone() -> None:
    tokenizer = byte_tokenizer(decoders.ByteLevel())
    ids = [tokenizer.token_to_id(letter) for letter in ("Ã", "c", "a", "t")]  # 0xC3 begins a character of two bytes
    found = pieces({"token_ids": ids, "token_rewards": [1.0, 2.0, 3.0, 4.0]}, tokenizer.decode)
    assert [(piece.text, piece.reward) for piece in found] == [("\ufffd", 1.0), ("c", 2.0), ("a", 3.0), ("t", 4.0)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2000))
def test_the_best_and_the_worst_are_shown(count: int) -> None:
    ranked = [7 * number % 2003 for number in range(count)]
    chosen = choose(ranked)
    assert len(chosen) == min(count, 300)
    assert len(set(chosen)) == len(chosen)
    assert chosen[:100] == ranked[:100]
    assert chosen[-100:] == ranked[-100:]
    order = [ranked.index(place) for place in chosen]
    assert order == sorted(order)


def test_rows_come_from_their_places(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", examples=2500)
    path = folder.dataset / "train.parquet"
    table = pq.read_table(path).to_pylist()
    places = [2499, 0, 1023, 1024, 49, 50, 2048]
    found = take(path, places)
    assert list(found) == places
    assert all(found[place]["text"] == table[place]["text"] for place in places)
    assert [found[place]["example_id"] for place in places] == places


def test_shades() -> None:
    assert [shade(value, 10.0) for value in (-99, -10, -9, -1.1, -0.9, 0, 0.9, 1.1, 5, 9.1, 10)] == [
        -5, -5, -4, -1, 0, 0, 0, 1, 2, 5, 5,
    ]  # fmt: skip
    assert shade(None, 1.0) == shade(3.0, 0.0) == 0
    assert extreme([]) == extreme([0.0, 0.0]) == 0
    assert extreme([float(n) for n in range(1000)]) == 980.0  # one outlier in a thousand does not wash out the rest
    assert extreme([0.0] * 999 + [4.0]) == 4.0


@settings(max_examples=300, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6))
def test_ticks_are_few_round_and_told_apart(low: float, length: float) -> None:
    high = low + length
    if high - low < 1e-9 * max(abs(low), abs(high)):
        return
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    room = (high - low) * 1e-6
    assert all(low - room <= value <= high + room for value in found)
    assert found == sorted(set(found))
    labels = tick_labels(found)
    assert len(set(labels)) == len(labels)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=3000))
def test_thin_lines_keep_their_ends_and_extremes(values: list[float]) -> None:
    points = [(float(step), value) for step, value in enumerate(values)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 3
    assert (kept[0], kept[-1]) == (points[0], points[-1])
    assert max(value for _, value in kept) == max(values)
    assert min(value for _, value in kept) == min(values)
    assert set(kept) <= set(points)


def test_lines_stay_in_the_picture_and_rise_where_the_values_do() -> None:
    line = Line("x", tuple((float(step), value) for step, value in enumerate([1e-9, 3e-9, 2e-9, 9e-9])))
    svg = str(Chart("c", "t", "", "", (line,), ("control", 0.0)).svg())
    match = re.search(r'points="([^"]+)"', svg)
    assert match is not None
    points = [tuple(map(float, pair.split(","))) for pair in match[1].split()]
    xs, ys = zip(*points, strict=True)
    assert xs == tuple(sorted(xs))
    assert 0 <= min(xs) < max(xs) <= 380
    assert 0 <= min(ys) < max(ys) <= 210
    assert ys[1] < ys[0]  # larger is higher
    assert (ys[0] - ys[3]) / (ys[0] - ys[1]) == pytest.approx(4, rel=0.01)  # in proportion


def test_what_is_not_finite_is_left_out() -> None:
    rows = [{"step": 0, "phi": math.nan}, {"step": 1, "phi": -1.0, "loss": math.inf}, {"step": 2, "phi": 10**400}]
    (chart,) = curves(rows, {"phi": "no number"})
    assert chart.lines[0].points == ((1.0, -1.0),)
    assert "nan" not in str(chart.svg())
    assert curves([], {}) == []
    assert measures([{"step": 0, "phi": 1, "loss": 1, "policy_kl": 0, "seconds_x": 1}]) == ["loss"]


def palette(dark: bool) -> dict[str, tuple[float, ...]]:
    """Colours of the style sheet by name, as sRGB in 0 … 1."""
    light_part, _, rest = STYLE.partition("@media screen and (prefers-color-scheme: dark)")
    part = rest.partition("* {")[0] if dark else light_part
    found = re.findall(r"--([\w-]+): #([0-9a-f]{6})", part)
    return {name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name, value in found}


def linear(colour: tuple[float, ...]) -> np.ndarray:
    values = np.array(colour)
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Contrast ratio of WCAG 2."""
    one, two = (float(linear(colour) @ [0.2126, 0.7152, 0.0722]) + 0.05 for colour in (first, second))
    return max(one, two) / min(one, two)


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable(dark: bool) -> None:
    """WCAG AA: 4.5 for text, 3 for lines of charts."""
    colours = palette(dark)
    pairs = [(ink, back) for ink in ("ink", "soft", "link") for back in ("page", "panel")]
    pairs += [(name, f"{name}-back") for name in ("good", "bad", "open")]
    pairs += [("ink", f"{name}-back") for name in ("good", "bad", "open")]
    pairs += [(f"{sign}{number}-ink", f"{sign}{number}") for sign in "pn" for number in range(1, 6)]
    ratios = {pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in ratios.items() if ratio < 4.5} == {}
    for name in ("line-0", "line-1", "line-2", "reference"):
        assert contrast(colours[name], colours["page"]) >= 3, name


# Red-green blindness as a linear map of linear RGB (Viénot, Brettel and Mollon 1999).
PROTAN = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
DEUTAN = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear sRGB (D65)."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(to_xyz @ rgb / [0.9505, 1.0, 1.089], 1e-4, None))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("map_", [np.eye(3), PROTAN, DEUTAN], ids=["all cones", "protan", "deutan"])
def test_signs_differ_for_colour_blind_readers(map_: np.ndarray, dark: bool) -> None:
    """Equal sizes of opposite sign are far apart (a ΔE of 2.3 is just noticeable)."""
    colours = palette(dark)
    for number in range(1, 6):
        positive, negative = (lab(map_ @ linear(colours[f"{sign}{number}"])) for sign in "pn")
        assert np.linalg.norm(positive - negative) > (12 if number == 1 else 25), number


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["dpg", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "run", examples=30)
    assert run_cli(monkeypatch, "report", folder.path) == 0
    assert capsys.readouterr().out.strip() == str(folder.path / "report.html")
    out = tmp_path / "page.html"
    assert run_cli(monkeypatch, "report", folder.path, "--out", out, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out), "bytes": out.stat().st_size}
    assert out.read_bytes() == (folder.path / "report.html").read_bytes()  # the same run gives the same page
    assert run_cli(monkeypatch, "report", folder.path, "--out", out) == 2
    assert run_cli(monkeypatch, "report", folder.path, "--out", out, "--overwrite") == 0
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    assert run_cli(monkeypatch, "report", folder.path, "--open") == 0
    assert opened == [(folder.path / "report.html").as_uri()]


@pytest.mark.parametrize("fault", ["run.json", "verify.json", "metrics.jsonl", "config.toml", "dataset/train.parquet"])
def test_a_damaged_run_gives_one_line(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "run", examples=5)
    (folder.path / fault).write_text("[[[\n[[[\n")
    assert run_cli(monkeypatch, "report", folder.path) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert str(folder.path) in lines[0]
    assert not (folder.path / "report.html").exists()


def test_no_run_folder_and_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(monkeypatch, "report", tmp_path) == 2
    folder = make_run(tmp_path / "run", examples=5)
    assert run_cli(monkeypatch, "report", folder.path, "--out", tmp_path) == 2
    assert run_cli(monkeypatch, "report", folder.path, "--out", tmp_path / "no" / "where.html") == 2
    assert all(len(line) > 30 for line in capsys.readouterr().err.strip().splitlines())


def test_exported_parquet_marks_itself(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", examples=3)
    for name in ("train.parquet", "control.parquet"):
        mark = json.loads(pq.read_schema(folder.dataset / name).metadata[b"dpg"])
        assert mark["synthetic"] is True
        assert "steering" in mark["purpose"]


def test_the_pages_for_readers_are_linked_and_name_what_exists() -> None:
    root = Path(__file__).parent.parent
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name in ("RESPONSIBLE_USE.md", "SECURITY.md", "docs/report.png"):
        assert f"({name})" in readme
        assert (root / name).is_file()
    files = {path: path.read_text(encoding="utf-8") for path in (root / "dpg_cli").rglob("*.py")}
    # A Trainer's optimizer.pt is the one pickle that is read, by the loader that runs nothing.
    checkpoint = files.pop(root / "dpg_cli" / "attribution" / "checkpoint.py")
    assert re.findall(r"torch\.load\(.*\)\n", checkpoint) == [
        'torch.load(path, map_location="cpu", weights_only=True)\n'
    ]
    sources = "".join(files.values())
    # SECURITY.md says that these never happen.
    assert "trust_remote_code=True" not in sources
    assert not re.search(r"\bpickle\.|torch\.load\(|weights_only", sources)
    assert "use_safetensors=True" in sources
