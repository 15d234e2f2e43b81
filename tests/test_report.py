"""The report: what it shows of runs, what it says of what is missing, and that no text becomes markup."""

import dataclasses
import html.parser
import json
import math
import pathlib
import re
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from solrl_jax import config, disk, report
from solrl_jax.config import Config
from solrl_jax.report import gallery, plot, run
from solrl_jax.run import pictures

EVIL = '<script>alert("x")</script>&amp;'
CFG = Config(name="toy", reward="clipscore", evaluate=config.Evaluate(every=2, prompts=4, grid=3, rewards="shapes"))


class Tree(html.parser.HTMLParser):
    """Elements of a page as (tag, attributes), the text in them, and whether every one that opens is closed."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [a for t, a in self.elements if t == tag and wanted.items() <= a.items()]

    @property
    def text(self):
        return " ".join(self.texts)


def write(folder, lines, cfg=CFG, prompts=("a", "b", "c"), seed=0, drawn=True, change=0.0, values=None):
    """A run directory; `lines` are metrics by iteration. Two runs of one `seed` have the same base."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(values) if values else config.to_json(cfg))
    told = [json.dumps({"iteration": i, **metrics}) for i, metrics in lines.items()]
    (folder / "metrics.jsonl").write_text("\n".join(told))
    start = {"after": 0, "devices": 2, "device": "toy card", "jax": "0.0", "notes": ["12 prompts", EVIL]}
    (folder / "starts.json").write_text(json.dumps([start]))
    images = np.random.default_rng(seed).integers(0, 256, (len(prompts), 8, 8, 3), np.uint8)
    if drawn:
        (folder / "grids").mkdir()
        scores = {"clipscore": np.linspace(0.25, 0.5, len(prompts)), "shapes": np.full(len(prompts), 0.5)}
        pictures.save(folder / "grids/base.npz", pictures.Shown(list(prompts), images, scores, scores), 0, "how")
        after = {name: value + change for name, value in scores.items()}
        shown = pictures.Shown(list(prompts), (images // 2 + 100 * change).astype(np.uint8), after, after)
        pictures.save(folder / "grids/last.npz", shown, 4, "how")
    return folder


def metrics(gain=0.0, held=0.0, count=4):
    """Metrics of `count` iterations; the trained reward gains, the held-out one changes by `held`."""
    found = {}
    for i in range(count + 1):
        found[i] = (
            {} if i == 0 else {"reward/mean": 0.3 + i / 50, "grad_norm": 0.1, "kl_div": 1e-3 * i, "time/learn": 2}
        )
        found[i] |= {} if i == 0 else {"time/iteration": 36.0 if i > 1 else 108.0, "rank/spearman": 0.8}
        if i % 2 == 0:
            share = i / count
            found[i] |= {"eval_reward_clipscore": 0.4 + gain * share, "eval_reward_avg": 0.4 + gain * share}
            found[i] |= {"eval_reward_shapes": 0.7 + held * share}
    return found


def made(tmp_path, *folders):
    text = report.write(folders, tmp_path / "out.html").read_text()
    return text, Tree(text)


def test_two_runs_side_by_side(tmp_path):
    grown = dataclasses.replace(CFG, seed=7, iterations=4)
    one = write(tmp_path / "one", metrics(0.05, 0.02), change=0.125)
    two = write(tmp_path / "two", metrics(0.01, -0.02), grown, change=-0.25)
    text, tree = made(tmp_path, one, two)
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.sub(r"<[^>]*>", "", c).strip() for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", rows[2])]
    assert cells == [
        *("one", "sol_rl", "clipscore", "4 of 300", "0.06"),  # 108 + 3 x 36 seconds
        *("0.4000", "0.4500", "+0.0500", "0.4500 at 4"),
        *("0.7000", "0.7200", "+0.0200", "0.7200 at 4"),
    ]
    assert "0.7000 at 0" in re.sub(r"<[^>]*>", "", rows[3]) and "-0.0200" in rows[3]
    assert "shapes (held out)" in tree.text and "avg" not in tree.texts
    assert "the trained reward rose by 0.01 (0.4 to 0.41) while shapes, held out, fell by 0.02" in tree.text
    assert "2 x toy card" in tree.text and "explore auto, regenerate bf16" in tree.text
    apart = text[text.index("Where the configs differ") :].split("</table>")[0]
    assert re.findall(r'<th scope="row">([^<]*)', apart) == ["iterations", "seed"]
    # Three prompts, the base and each run: a picture is in the page once, with a text and its rewards.
    images = tree.all("img")
    assert len(images) == 3 * 3 == len({p["src"] for p in images})
    assert [p["alt"] for p in images[:4]] == ["a — base", "a — one", "a — two", "b — base"]
    assert all(p["src"].startswith("data:image/png;base64,") for p in images)
    assert tree.texts.count("+0.1250") == 6 and tree.texts.count("-0.2500") == 6 and "0.6250" in tree.texts
    # A line per run in every plot but that of what only one has, in the run's own style everywhere.
    plots = re.findall(r'<figure class="plot">.*?</figure>', text)
    assert len(plots) == 7 and all(p.count("<polyline") == 2 for p in plots)
    assert {c for p in plots for c in re.findall(r'<polyline[^>]*class="(s\d)"', p)} == {"s0", "s1"}


def test_ranks_of_branches_are_a_plot_of_their_own(tmp_path):
    """A branch's preview is compared with what goes on from it, a restart's with what is drawn from the noise."""
    explore = dataclasses.replace(CFG.explore, steps=5)
    branch = dataclasses.replace(CFG, explore=explore, branch=config.Branch(3, 4))
    text, _ = made(tmp_path, write(tmp_path / "one", metrics()), write(tmp_path / "two", metrics(), branch))
    plots = re.findall(r'<figure class="plot"><h3>([^<]*)</h3>(.*?)</figure>', text)
    ranks = {title: drawn.count("<polyline") for title, drawn in plots if title.startswith("rank/")}
    assert ranks == {"rank/spearman": 1, "rank/spearman, branches": 1}
    assert {drawn.count("<polyline") for title, drawn in plots if not title.startswith("rank/")} == {2}


def test_a_page_is_whole_and_asks_for_nothing(tmp_path):
    text, tree = made(tmp_path, write(tmp_path / "one", metrics(0.1)))
    assert len(tree.all("script")) == 1 and not tree.all("script", src=None)
    (policy,) = (m["content"] for m in tree.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:; ") and "sha256-" in policy
    addresses = [a[key] for _, a in tree.elements for key in ("src", "href", "action", "srcset") if key in a]
    assert addresses and all(a.startswith(("#", "data:")) for a in addresses)
    assert "url(" not in text and "@import" not in text and not re.search(r"https?:", text)
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text and tree.all("html", lang="en")
    names = [a["id"] for _, a in tree.elements if "id" in a]
    assert len(names) == len(set(names))
    assert {a["href"][1:] for a in tree.all("a")} <= set(names)  # every link leads to something
    heads = tree.all("th")
    assert heads and all("scope" in th for th in heads) and len(tree.all("caption")) == len(tree.all("table"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in tree.all("svg"))
    assert next(t for t, _ in tree.elements if re.fullmatch("h[1-6]", t)) == "h1" and len(tree.all("h1")) == 1
    assert len(text) < 120_000


def test_no_text_becomes_markup(tmp_path):
    names = [tmp_path / "<b>&one" / "x", tmp_path / '"two' / "x"]
    cfg = dataclasses.replace(CFG, name=EVIL.replace("/", ""), reward=EVIL, prompt_files="\ud800" + EVIL)
    for folder in names:
        write(folder, {1: {EVIL: math.nan, f"time/{EVIL}": 1.0, f"eval_reward_{EVIL}": 1.0}}, cfg, (EVIL, "'>", "c"))
    for folders in (names, names[:1]):
        text, tree = made(tmp_path, *folders)
        assert len(tree.all("script")) == 1 and not tree.all("b", x=None) and text.count("alert") > 5
        assert text.count("<script") == 1 and EVIL in tree.text
        assert sorted({p["alt"] for p in tree.all("img")})[0].startswith("'> — ")
    assert any("<b>&one/x" in words for words in made(tmp_path, *names)[1].texts)


def test_what_is_missing_is_said(tmp_path):
    gaps = metrics(0.1)
    gaps[2]["grad_norm"] = gaps[3]["grad_norm"] = None
    gaps[4]["eval_reward_shapes"] = math.inf
    runs = {
        "whole": write(tmp_path / "whole", metrics(0.1)),
        "gaps": write(tmp_path / "gaps", gaps),
        "none": write(tmp_path / "none", {}, drawn=False),
        "blind": write(tmp_path / "blind", {1: {"reward/mean": 1.0}}, drawn=False),
        "prompts": write(tmp_path / "prompts", metrics(), prompts=("x", "y"), seed=3),
        "old": write(tmp_path / "old", metrics(), drawn=False, values={"name": "old", "reward": "nice:2", "steps": 4}),
    }
    (runs["old"] / "grids").mkdir()
    (runs["old"] / "starts.json").unlink()
    pictures.write_grid(runs["old"] / "grids/000004.png", ["a"], {"base": np.zeros((1, 8, 8, 3), np.uint8)})
    np.savez(runs["old"] / "grids/base.npz", images=np.zeros((1, 8, 8, 3), np.uint8), how="x")
    text, tree = made(tmp_path, *runs.values())
    for words in (
        "grad_norm is not a finite number in 2 of 5 lines (iteration 2, 3).",
        "eval_reward_shapes is not a finite number in 1 of 5 lines (iteration 4).",
        "No iteration is finished: there is nothing to plot yet.",
        "It has no evaluation: there are no rewards before and after.",
        "of none, blind: never evaluated.",
        "of old: written by an older version of solrl_jax, which kept grids alone.",
        "The runs differ in the prompts, seeds or bases of their pictures: each kind has its own rows.",
        "The runs are trained on different rewards; a dash: not evaluated.",
        "Its config is of another version and is shown as it is written: unknown fields steps",
        "Not recorded, by an older version of solrl_jax: the devices of old.",
    ):
        assert words in tree.text, words
    assert "nan" not in text.lower().replace("finance", "") and "inf<" not in text
    assert [p["alt"] for p in tree.all("img") if p["alt"].startswith("grid")] == ["grid of old, iteration 4"]
    for folder in runs.values():
        made(tmp_path, folder)


def test_runs_with_other_bases_are_told_apart(tmp_path):
    shifted = {i: {k: v + 0.2 for k, v in line.items()} for i, line in metrics().items()}
    folders = [
        write(tmp_path / name, lines, seed=s) for s, (name, lines) in enumerate([("a", metrics()), ("b", shifted)])
    ]
    text, tree = made(tmp_path, *folders)
    assert "The base's clipscore, shapes differs between the runs" in tree.text and "each kind has its own rows" in text
    one, two = (run.read(folder, folder.name).base.shown for folder in folders)
    assert not gallery.alike(one, two) and gallery.alike(one, one._replace(images=one.images ^ 1))


def test_a_reward_that_should_fall_is_best_where_it_is_lowest(tmp_path):
    cfg = dataclasses.replace(CFG, reward="clipscore:-1")
    text, _ = made(tmp_path, write(tmp_path / "run", metrics(-0.1), cfg))
    assert '<td class="n up">-0.1000</td><td class="n">0.3000 <small>at 4</small></td>' in text


def test_names_are_as_long_as_they_must_be(tmp_path):
    folders = [write(tmp_path / name, {}) for name in ("a/run", "b/run", "c")]
    assert [r.name for r in run.read_all(folders)] == ["a/run", "b/run", str(tmp_path.name) + "/c"]
    assert [r.name for r in run.read_all(folders[:1])] == ["run"]
    with pytest.raises(report.ReportError, match="is given twice"):
        run.read_all([folders[0], folders[0]])
    with pytest.raises(report.ReportError, match="not the directory of a run: it has no config"):
        run.read_all([tmp_path])
    with pytest.raises(report.ReportError, match="no run to report"):
        run.read_all([])
    for text in ("{", "[" * 100_000):
        (folders[0] / "config.json").write_text(text)
        with pytest.raises(report.ReportError, match=r"config\.json: not the JSON of a config"):
            run.read_all(folders)


@pytest.mark.parametrize("count, blocks, rows", [(1, 1, 1), (2, 1, 2), (8, 2, 4), (24, 3, 8), (5, 2, 3)])
def test_a_grid_is_not_higher_than_wide(tmp_path, count, blocks, rows):
    """Two columns of 64 px pictures at twice their size; every picture is in its place."""
    shades = np.arange(1, 1 + 2 * count, dtype=np.uint8).reshape(2, count, 1, 1, 1) * np.ones((64, 64, 3), np.uint8)
    file = pictures.write_grid(tmp_path / "grid.png", ["a fox"] * count, dict(zip("ab", shades, strict=True)))
    with Image.open(file) as grid:
        assert grid.size == (blocks * (180 + 2 * 134), 24 + rows * 134)
        for i in range(count):
            at = [grid.getpixel((i // rows * 448 + x, 24 + i % rows * 134 + 64)) for x in (180 + 64, 314 + 64)]
            assert at == [(1 + i,) * 3, (1 + count + i,) * 3]


def test_kept_pictures_come_back(tmp_path):
    shown = pictures.Shown(["a\0", "ü"], np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3), {}, {})
    with_scores = shown._replace(scores={"r": np.array([math.nan, 0.5], np.float32)})
    for one in (shown, with_scores):
        pictures.save(tmp_path / "x.npz", one, 5, "how")
        back = pictures.load(tmp_path / "x.npz")
        assert back.shown.prompts == one.prompts and (back.iteration, back.how) == (5, "how")
        np.testing.assert_array_equal(back.shown.images, one.images)
        assert back.shown.scores.keys() == one.scores.keys()
    np.testing.assert_array_equal(back.shown.scores["r"], with_scores.scores["r"])
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    text = gallery.score_list({"r": math.nan}, {"r": 0.5}, {})
    assert "not finite" in text and "nan" not in text


def test_large_pictures_are_shrunk_and_small_ones_kept():
    import base64
    import io

    for size, wanted in ((512, 256), (32, 32)):
        uri = gallery.data_uri(np.zeros((size, size, 3), np.uint8))
        assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (wanted, wanted)


def test_curves_show_names_ranges_and_lone_points():
    svg = plot.curve({"a<b": [(1, 0.5), (2, 1.5)], "lone": [(3, 1.0)]}, title="t", unit="seconds")
    assert "t, by iteration. a&lt;b: 0.5 to 1.5; lone: 1 to 1" in svg
    assert svg.count("<polyline") == 2 and svg.count("<circle") == 3 and "nan" not in svg
    assert ">1.5<" in svg and ">0.5<" in svg and ">seconds<" in svg and ">iteration<" in svg
    first, second = (re.search(r"stroke=\"(.*?)\"", part)[1] for part in svg.split("<polyline")[1:])
    assert first != second and svg.count("stroke-dasharray") == 1  # told by colour and by dashes
    assert 'data-x="1 2" data-y="0.5 1.5"' in svg
    long = plot.curve({"long": [(i, i) for i in range(5001)]})
    drawn = re.search(r'data-x="([^"]*)', long)[1].split()
    assert len(drawn) <= plot.MOST + 1 and (drawn[0], drawn[-1]) == ("0", "5000")


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.31, 0.47], (0.3, 0.35, 0.4, 0.45, 0.5)),
        ([0, 4], (0, 1, 2, 3, 4)),
        ([-3, 95], (-50, 0, 50, 100)),
        ([2.0], (1.8, 1.9, 2.0, 2.1, 2.2)),
    ],
)
def test_axes_are_marked_at_round_numbers(values, ticks):
    assert plot.axis(values).ticks == pytest.approx(ticks)


FINITE = st.floats(-1e300, 1e300, exclude_min=True, exclude_max=True)


@settings(max_examples=50, deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=4), st.lists(st.integers(0, 10**9), min_size=1, max_size=4))
def test_any_finite_numbers_can_be_drawn(values, iterations):
    up, across = plot.axis(values), plot.axis(iterations, whole=True)
    for found, numbers in ((up, values), (across, iterations)):
        assert found.low <= min(numbers) and found.high >= max(numbers) and found.high > found.low
        assert len(found.ticks) < 12
    svg = plot.curve({"a": list(zip(sorted(iterations), values, strict=False))})
    assert "nan" not in svg and "inf" not in svg


def test_metrics_that_are_no_numbers_are_left_out():
    one = run.Run("r", None, {}, None, [{"iteration": 1, "x": None, "y": 2.0, "z": "text"}], [], None, None, [])
    assert one.points("x") == one.points("z") == [] and one.points("y") == [(1, 2.0)]
    assert run.metrics([one], ("y", "x")) == ["y"]


CUT = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "other": lambda content: b'{"a": 1}',
}


@pytest.mark.parametrize("harm", CUT)
@pytest.mark.parametrize("name", ["starts.json", "grids/base.npz", "grids/last.npz"])
def test_a_file_that_cannot_be_read_is_absent_and_named_once(tmp_path, name, harm):
    file = write(tmp_path / "run", metrics(0.1)) / name
    file.write_bytes(CUT[harm](file.read_bytes()))
    text, tree = made(tmp_path, tmp_path / "run")
    assert tree.text.count(f"{file} cannot be read and counts as absent (") == 1
    assert "older version" not in tree.text and "only the base was evaluated" not in tree.text
    assert "never evaluated" not in tree.text and "0.5000 at 4" in re.sub(r"<[^>]*>", "", text)
    expected = {"starts.json": 6, "grids/base.npz": 0, "grids/last.npz": 3}[name]
    assert len(tree.all("img")) == expected
    assert (f"its {file.stem}.npz cannot be read" in tree.text) == (expected != 6)


def test_a_grid_that_cannot_be_read_is_named(tmp_path):
    folder = write(tmp_path / "run", metrics(0.1), drawn=False)
    file = pictures.write_grid(folder / "grids/000004.png", ["a"], {"base": np.zeros((1, 8, 8, 3), np.uint8)})
    assert len(made(tmp_path, folder)[1].all("img")) == 1
    file.write_bytes(file.read_bytes()[:40])
    _, tree = made(tmp_path, folder)
    assert not tree.all("img") and tree.text.count(f"{file} cannot be read") == 1


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_no_flipped_byte_of_kept_pictures_stops_a_report(place, change):
    """It is read as it was, or told: zip archives have bytes that nothing reads."""
    shown = pictures.Shown(["a"], np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3), {}, {})
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "x.npz"
        pictures.save(file, shown, 5, "how")
        content = bytearray(file.read_bytes())
        content[place % len(content)] ^= change
        file.write_bytes(content)
        found = disk.readable(pictures.load, file, said := [])
    if said:
        assert found is None and "x.npz cannot be read" in said[0]
    else:
        np.testing.assert_array_equal(found.shown.images, shown.images)
