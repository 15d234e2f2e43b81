"""Make the emoji world's atlases from two npm packages and one font; the only step that needs the network.

    python -m experiments.emoji.build                      # downloads 90 MB from the npm registry, writes assets/
    python -m experiments.emoji.build --cache=DIR          # reads the two archives from DIR if they are there

Archives are pinned: name, version and sha512. They are unpacked in memory and nothing of them is run. `PICKS` are the
objects: one clear name of one or two words each, none that looks much like another. Left out are flags, people, faces
of feelings, letters and symbols.
"""

import argparse
import base64
import functools
import hashlib
import io
import json
import re
import tarfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).resolve().parent
CELL, COLUMNS = 32, 16  # pixels of a template; templates in a row of an atlas
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONT_SIZE = 27  # the capitals of DejaVu Sans Bold are then 20 px high and W, the widest, fits a cell
FAINT = 8  # alpha of 255 up to which a pixel is not part of a picture's box


class Package(NamedTuple):
    name: str
    version: str
    sha512: str  # base64, as the registry states it

    @property
    def url(self) -> str:
        file = self.name.rpartition("/")[2]
        return f"https://registry.npmjs.org/{self.name}/-/{file}-{self.version}.tgz"


FLUENT = Package(
    "@lobehub/fluent-emoji-3d",
    "1.1.0",
    "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
)
NOTO = Package(
    "emoji-datasource-google",
    "16.0.0",
    "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
)

# A short name of emoji-datasource, and after "=" the object's name in captions if it is another one; "_" is a space.
PICKS = """
fox_face=fox wolf bear panda_face=panda koala tiger lion_face=lion cow pig frog monkey_face=monkey rabbit dog cat
mouse unicorn_face=unicorn zebra_face=zebra raccoon elephant dromedary_camel=camel giraffe_face=giraffe sheep rooster
duck owl penguin flamingo peacock parrot turtle snake crocodile whale dolphin shark octopus crab lobster
tropical_fish=fish snail butterfly bee ladybug spider sloth rhinoceros=rhino sauropod=dinosaur jellyfish
baby_chick=chick dragon_face=dragon cactus palm_tree tulip rose sunflower maple_leaf mushroom apple pear banana lemon
strawberry watermelon pineapple coconut avocado tomato eggplant carrot hamburger=burger pizza hotdog=hot_dog taco
croissant pretzel doughnut=donut cookie cake cupcake lollipop icecream=ice_cream teapot coffee=cup wine_glass
beer=beer_mug rocket helicopter airplane car taxi bus ambulance fire_engine=fire_truck tractor truck bike train2=train
boat=sailboat ship anchor tent house european_castle=castle volcano ferris_wheel traffic_light fuelpump=gas_pump
rainbow umbrella snowman_without_snow=snowman star crescent_moon=moon ringed_planet=planet fire=flame snowflake
flying_saucer=ufo alarm_clock=clock hourglass watch luggage=suitcase wheel skateboard roller_skate gift=present
jack_o_lantern=pumpkin christmas_tree balloon kite trophy soccer=soccer_ball basketball football baseball
8ball=billiard_ball boxing_glove teddy_bear joystick jigsaw=puzzle ribbon=bow crown ticket chess_pawn=pawn art=palette
guitar violin trumpet saxophone drum_with_drumsticks=drum accordion microphone camera tv=television battery
bulb=light_bulb candle key lock hammer axe carpentry_saw=saw gear magnet ladder bucket closed_book=book package=box
pencil2=pencil paperclip bomb gem=diamond ring tophat=top_hat shirt dress boot handbag billed_cap=cap chair bed toilet
shield telescope shopping_trolley=shopping_cart mailbox computer=laptop robot_face=robot ghost alien skull
clown_face=clown feather shell
"""
IRREGULAR = {"wolf": "wolves", "mouse": "mice", "maple leaf": "maple leaves", "snowman": "snowmen"}
SAME = ("sheep", "fish", "jellyfish")


def plural(name: str) -> str:
    """The plural of an object's name. Its last word takes the ending, as in "hot dogs"."""
    if name in IRREGULAR or name in SAME:
        return IRREGULAR.get(name, name)
    if re.search(r"(s|x|ch|sh)$", name) or name in ("tomato", "volcano"):
        return name + "es"
    return re.sub(r"(?<=[^aeiou])y$", "ie", name) + "s"


def picks() -> dict[str, str]:
    """{short name: name in captions}, in the order of the atlases."""
    words = [word.partition("=") for word in PICKS.split()]
    return {short: (name or short).replace("_", " ") for short, _, name in words}


# --- sources --------------------------------------------------------------------------------------------------------


def archive(package: Package, cache: Path | None) -> tarfile.TarFile:
    """The package's archive, from `cache` or the registry. ValueError if its hash is not the pinned one."""
    file = cache / package.url.rpartition("/")[2] if cache else None
    if file and file.exists():
        content = file.read_bytes()
    else:
        with urllib.request.urlopen(package.url) as response:
            content = response.read()
    found = base64.b64encode(hashlib.sha512(content).digest()).decode()
    if found != package.sha512:
        raise ValueError(
            f"{file or package.url} has sha512 {found}, not the pinned {package.sha512}: download it again"
        )
    return tarfile.open(fileobj=io.BytesIO(content))


def member(packed: tarfile.TarFile, name: str) -> bytes:
    """One file of an npm archive. KeyError if it lacks it."""
    file = packed.extractfile(f"package/{name}")
    assert file is not None, f"{name} is a folder"
    return file.read()


def template(picture: bytes) -> Image.Image:
    """A picture without its margins, its longer side CELL px, centred in a square cell."""
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    image = image.crop(image.getchannel("A").point([0] * (FAINT + 1) + [255] * (255 - FAINT)).getbbox())
    width, height = (max(1, round(side * CELL / max(image.size))) for side in image.size)
    cell = Image.new("RGBA", (CELL, CELL))
    cell.paste(image.resize((width, height), Image.Resampling.LANCZOS), ((CELL - width) // 2, (CELL - height) // 2))
    return cell


def atlas(cells: list[Image.Image]) -> Image.Image:
    """Cells in rows of COLUMNS. Invisible pixels are black, which packs better."""
    sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
    for i, cell in enumerate(cells):
        pixels = np.array(cell)
        pixels[pixels[..., 3] == 0] = 0
        sheet.paste(Image.fromarray(pixels), (i % COLUMNS * CELL, i // COLUMNS * CELL))
    return sheet


def fonts() -> Path:
    """Where matplotlib has DejaVu and its licence."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts/ttf"


def letters() -> tuple[list[Image.Image], dict[str, float]]:
    """White capitals, and the width of each with its spacing, in cells. Drawn 8 times as large and averaged down."""
    many = 8
    font = ImageFont.truetype(fonts() / "DejaVuSans-Bold.ttf", many * FONT_SIZE)
    cells, widths = [], {}
    for letter in LETTERS:
        alpha = Image.new("L", (many * CELL, many * CELL))
        ImageDraw.Draw(alpha).text((many * CELL / 2, many * (CELL + 20) / 2), letter, fill=255, font=font, anchor="ms")
        alpha = alpha.resize((CELL, CELL), Image.Resampling.BOX)
        cells.append(Image.merge("RGBA", [alpha.point(lambda _: 255)] * 3 + [alpha]))
        widths[letter] = round(font.getlength(letter) / (many * CELL), 4)
    return cells, widths


# --- output ---------------------------------------------------------------------------------------------------------

MIT = """MIT License

{holders}

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
FLUENT_HOLDERS = (
    "Copyright (c) 2023 LobeHub (the package @lobehub/fluent-emoji-3d, whose README states this licence)\n"
    "Copyright (c) Microsoft Corporation (the pictures, Fluent Emoji)"
)
SOURCES = """# Where these files come from

Made by `python -m experiments.emoji.build`; the packages' own code is never run. Pictures were cropped to what is
visible and reduced to {cell} px; nothing else was changed.

| file | made from | licence |
|---|---|---|
| `fluent.png` | {count} pictures of [{fluent.name}]({fluent.url}) {fluent.version} | MIT, `LICENSE-fluent` |
| `noto.png` | the same objects in [{noto.name}]({noto.url}) {noto.version}: Noto Emoji, Copyright Google | \
Apache-2.0, `LICENSE-noto` |
| `names.json` | code points and short names of {noto.name}'s `emoji.json`, with names and plurals of our own | \
MIT, `LICENSE-emoji-datasource` |
| `letters.png` | DejaVu Sans Bold of matplotlib {matplotlib} | Bitstream Vera and Arev, `LICENSE-dejavu` |

sha512 of the archives, base64:

- {fluent.name}: `{fluent.sha512}`
- {noto.name}: `{noto.sha512}`

sha256 of the files:

{digests}
"""


def write(folder: Path, fluent: tarfile.TarFile, noto: tarfile.TarFile) -> None:
    """Atlases, names.json, licences and SOURCES.md. ValueError for a pick that a package lacks."""
    known = {entry["short_name"]: entry for entry in json.loads(member(noto, "emoji.json"))}
    if strange := [short for short in picks() if short not in known]:
        raise ValueError(f"PICKS: {NOTO.name} {NOTO.version} has no {', '.join(strange)}")
    folder.mkdir(parents=True, exist_ok=True)
    codes = {short: known[short]["unified"].lower() for short in picks()}
    save = functools.partial(Image.Image.save, optimize=True)
    save(atlas([template(member(fluent, f"assets/{code}.webp")) for code in codes.values()]), folder / "fluent.png")
    pictures = [template(member(noto, f"img/google/64/{known[short]['image']}")) for short in codes]
    save(atlas(pictures), folder / "noto.png")
    capitals, widths = letters()
    save(atlas(capitals), folder / "letters.png")
    objects = [{"name": name, "plural": plural(name), "code": codes[short]} for short, name in picks().items()]
    lines = ",\n".join(f"    {json.dumps(thing)}" for thing in objects)
    text = f'{{\n  "objects": [\n{lines}\n  ],\n  "letters": {json.dumps(widths)}\n}}\n'
    (folder / "names.json").write_text(text)
    (folder / "LICENSE-fluent").write_text(MIT.format(holders=FLUENT_HOLDERS))
    (folder / "LICENSE-noto").write_text((HERE.parents[1] / "LICENSE").read_text())
    (folder / "LICENSE-emoji-datasource").write_bytes(member(noto, "LICENSE"))
    (folder / "LICENSE-dejavu").write_bytes((fonts() / "LICENSE_DEJAVU").read_bytes())
    (folder / "SOURCES.md").write_text(sources(folder, len(objects)))


def sources(folder: Path, count: int) -> str:
    from matplotlib import __version__ as matplotlib

    names = ("fluent.png", "noto.png", "letters.png", "names.json")
    digests = "\n".join(f"- {name}: `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}`" for name in names)
    return SOURCES.format(cell=CELL, count=count, fluent=FLUENT, noto=NOTO, matplotlib=matplotlib, digests=digests)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder that may hold the archives")
    parser.add_argument("--out", type=Path, default=HERE / "assets")
    args = parser.parse_args(argv)
    with archive(FLUENT, args.cache) as fluent, archive(NOTO, args.cache) as noto:
        write(args.out, fluent, noto)
    for file in sorted(args.out.iterdir()):
        print(f"{file.stat().st_size:8d} {file.name}")


if __name__ == "__main__":
    main()
