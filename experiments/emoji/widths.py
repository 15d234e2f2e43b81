"""Draw results/widths.svg: how well previews of 6 steps rank, against the width of the transformer.

    python -m experiments.emoji.widths

From three files of `experiments.ranks`, each of its own transformer (`experiments.emoji.pretrain --width`):
ranks.json of 384 channels, ranks_256.json and ranks_160.json, in results/. A file that is missing leaves its width out.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from experiments import curves
from experiments.emoji.pretrain import WIDTHS

HERE = Path(__file__).resolve().parent
PRECISIONS = ("NVFP4", "FP8", "BF16")
FIGURES = {"Spearman": "Spearman correlation", "kept contrast": "Kept contrast"}


def files(folder: Path) -> dict[int, Path]:
    """{width: its ranks} of those that are there, narrow ones first."""
    found = {width: folder / ("ranks.json" if width == WIDTHS[0] else f"ranks_{width}.json") for width in WIDTHS}
    return {width: file for width, file in sorted(found.items()) if file.is_file()}


def series(found: Mapping[int, Path], what: str, who: str = "base") -> dict[str, list[tuple[int, float]]]:
    """{precision: [(width, mean over captions)]} of previews of 6 steps by the base or the trained policy."""
    figures = {width: json.loads(file.read_text(encoding="utf-8"))["figures"] for width, file in found.items()}
    return {
        precision: [(width, figures[width][f"{who}, {precision}, 6 steps: {what}"]["value"]) for width in found]
        for precision in PRECISIONS
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder of the ranks")
    args = parser.parse_args(argv)
    found = files(args.results)
    if len(found) < 2:
        parser.error(f"--results={args.results}: ranks of two widths or more are needed, here are {len(found)}")
    panels = [curves.panel(series(found, what), title, "channels") for what, title in FIGURES.items()]
    (args.results / "widths.svg").write_text(curves.page([panels], PRECISIONS))


if __name__ == "__main__":
    main()
