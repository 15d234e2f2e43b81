"""Results files and the tables made from them."""

import json

import pytest

from experiments import results


def test_tables_are_made_from_the_files(tmp_path):
    one = {"exact": results.figure(0.5, "share", 10, [0.4, 0.6]), "time": results.figure(2.0, "s", 3, 0.1)}
    two = {"exact": results.figure(0.25, "share", 10, {"interval": [0.2, 0.3], "seeds": [0.2, 0.3]})}
    results.record(tmp_path / "arms/a.json", one, arm="a", about="first")
    results.record(tmp_path / "arms/b.json", two, arm="b", about="second")
    readme = tmp_path / "README.md"
    readme.write_text(
        "x\n<!-- table:arms/a.json -->\nold\n<!-- end -->\n"
        "y\n<!-- matrix:arms/b.json, arms/a.json | exact = right | time -->\n<!-- end -->\nz\n"
    )
    for _ in range(2):  # made anew from what it made
        results.fill(readme)
    assert readme.read_text().splitlines() == [
        "x",
        "<!-- table:arms/a.json -->",
        "| figure | value | unit | n |",
        "|---|---|---|---|",
        "| exact | 0.500 [0.400, 0.600] | share | 10 |",
        "| time | 2.000 ± 0.100 | s | 3 |",
        "<!-- end -->",
        "y",
        "<!-- matrix:arms/b.json, arms/a.json | exact = right | time -->",
        "| | right | time |",
        "|---|---|---|",
        "| b: second | 0.250 [0.200, 0.300] (0.200, 0.300) |  |",
        "| a: first | 0.500 [0.400, 0.600] | 2.000 ± 0.100 |",
        "<!-- end -->",
        "z",
    ]
    assert results.table(tmp_path / "arms/a.json", "t.*").splitlines()[2:] == ["| time | 2.000 ± 0.100 | s | 3 |"]
    assert [results._told(word) for word in ("/a/run", "--set=x=/a/y")] == ["run", "--set=x=y"]
    assert results._told("--out=/a/b/c.json") == "--out=c.json" and results._told("--out=b/c.json") == "--out=b/c.json"
    facts = json.loads((tmp_path / "arms/a.json").read_text())
    assert set(facts) >= {"command", "device", "versions", "commit", "date", "figures"}
    readme.write_text("<!-- table:none.json -->\n<!-- end -->")
    with pytest.raises(FileNotFoundError, match=r"there is no none.json"):
        results.fill(readme)


@pytest.mark.parametrize(
    "value, spread, text",
    [
        (0.02181, {"seeds": [0.02, 0.02], "error": 0.0004}, "0.0218 ± 0.0004"),  # the error's first digit
        (0.5, {"error": 0.02}, "0.500 ± 0.020"),
        (0.5, {"error": 0.0}, "0.500 ± 0.000"),
        (1.25e-4, None, "0.000125"),  # not 0.000
        (0.00144, None, "0.0014"),  # nor 0.001
        (0.0, None, "0.000"),
        (-2e-19, {"interval": [-0.01, 0.01]}, "-0.000 [-0.010, 0.010]"),
        (None, None, "-"),
    ],
)
def test_cells(value, spread, text):
    assert results.cell(results.figure(value, "", 1, spread)) == text


def test_a_row_each_setting_of_a_file(tmp_path):
    figures = {"4: gain": 0.5, "4: cost": 2.0, "8: gain": 0.25, "8: cost": 3.0, "all: gain": 1.0, "other: x": 1.0}
    results.record(tmp_path / "pool.json", {name: results.figure(v, "", 1) for name, v in figures.items()})
    readme = tmp_path / "README.md"
    readme.write_text("<!-- settings:pool.json | cost = s | gain -->\n<!-- end -->\n")
    results.fill(readme)
    assert readme.read_text().splitlines()[1:-1] == [
        "| | s | gain |",
        "|---|---|---|",
        "| 4 | 2.000 | 0.500 |",
        "| 8 | 3.000 | 0.250 |",
        "| all |  | 1.000 |",
    ]
