"""The contact sheet: a picture of each of twelve train and twelve test captions, drawn by world.py.

python -m experiments.emoji.sheet                          # results/sheet.png
python -m experiments.emoji.sheet --style=noto --out=FILE
"""

import argparse
import textwrap
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from experiments.emoji import build, world

COLUMNS, ROWS, ZOOM, LINE, GUTTER = 6, 4, 2, 13, 10  # of the sheet; pixels


def sheet(scenes: list[world.Scene], rng: np.random.Generator, style: str = "fluent") -> Image.Image:
    """COLUMNS x ROWS pictures, enlarged, each above its caption."""
    images = np.asarray(jax.jit(world.draw)(world.lay_out(scenes, rng), world.templates(style)))
    side = ZOOM * world.SIDE
    font = ImageFont.truetype(build.fonts() / "DejaVuSans.ttf", 10)
    step = side + GUTTER, side + 3 * LINE + GUTTER
    page = Image.new("RGB", (COLUMNS * step[0] + GUTTER, ROWS * step[1] + GUTTER), "white")
    pen = ImageDraw.Draw(page)
    for i, (scene, image) in enumerate(zip(scenes, images, strict=True)):
        x, y = (GUTTER + place * size for place, size in zip((i % COLUMNS, i // COLUMNS), step, strict=True))
        picture = Image.fromarray(np.round(255 * image).astype(np.uint8))
        page.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        pen.rectangle((x - 1, y - 1, x + side, y + side), outline="lightgray")
        for row, line in enumerate(textwrap.wrap(world.caption(scene), 22)):
            pen.text((x, y + side + 3 + row * LINE), line, fill="black", font=font)
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--style", choices=world.STYLES, default="fluent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/sheet.png")
    args = parser.parse_args(argv)
    rng = np.random.default_rng(args.seed)
    scenes = [scene for split in world.SPLITS for scene in world.sample(rng, COLUMNS * ROWS // 2, split)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(scenes, rng, args.style).save(args.out, optimize=True)
    print(f"{args.out.stat().st_size} bytes: {args.out.name}")


if __name__ == "__main__":
    main()
