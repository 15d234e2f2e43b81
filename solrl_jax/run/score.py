"""--mode=score: score pictures on disk by every reward, as a table and a CSV. No text-to-image model is loaded."""

import csv
import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from solrl_jax import disk, rewards
from solrl_jax.config import Config, ConfigError
from solrl_jax.rewards import NONE, Asked, Score, bound, own
from solrl_jax.run import assemble, data
from solrl_jax.structs import Params, Row

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


class PictureError(ValueError):
    """A picture cannot be scored; the message names the file."""


class Picture(NamedTuple):
    name: str  # relative to the folder of the pictures
    row: Row  # its prompt, and the other fields of its line
    size: tuple[int, int]  # width, height

    @property
    def prompt(self) -> str:
        return self.row["prompt"]


def run_score(cfg: Config, run: Path, *, prompts: str | None, images: str | None, devices: int | None) -> int:
    """Print one line per picture of the folder `images` and the means, and write <run>/scores.csv; on one device.

    The rewards are those of cfg.reward and cfg.evaluate.rewards; the weights of a mix are ignored. Raises ConfigError,
    DataError, PictureError, RewardError or WeightsError before anything is written.
    """
    if not prompts or not images:
        raise ConfigError("--mode=score needs --prompts=FILE and --images=DIR, the prompts of the pictures in DIR")
    if devices not in (None, 1):
        raise ConfigError(f"--devices={devices}: --mode=score uses one device, leave it out")
    if not assemble.reward_names(cfg):
        raise ConfigError(f"no reward is named: give --config.reward=NAME, of {', '.join(rewards.REWARDS)}")
    folder = Path(images)
    assemble.use_compilation_cache()
    found = pair(data.read_captions(prompts), folder, prompts)
    left = len(set(pictures_in(folder)) - {p.name for p in found})
    held_out = rewards.held_out(cfg.reward, cfg.evaluate.rewards)
    binding = bound.read([p.row for p in found], rewards.parse(cfg.reward), held_out, cfg.reward_unused)
    judges = assemble.open_rewards(cfg)
    asked = binding.masks(judges.judged.names, [p.row for p in found])
    scores = score_files(judges.judged, jax.device_put(judges.towers), found, folder, cfg.evaluate.chunk, asked)
    file = write_csv(run / "scores.csv", found, scores, asked)  # before the table, whose reader may be gone (| head)
    print("\n".join(table(found, scores, asked)))
    print(f"scores: {file}")
    if left:
        print(f"{left} pictures of {folder} are not named in {prompts} and were not scored")
    return 0


# --- pictures -------------------------------------------------------------------------------------------------------


def pair(captions: Sequence[Row], folder: Path, file: str) -> list[Picture]:
    """Pair pictures with rows: the pictures that `captions` names, or else all of the folder, sorted by name.

    Every picture is decoded here, so that a broken one is found before scoring starts; and so is a name that the CSV
    cannot hold. Raises PictureError.
    """
    if not folder.is_dir():
        raise PictureError(f"--images={folder} is not a folder: give the folder of the pictures")
    names = [row["file"] for row in captions if row.get("file")] or pictures_in(folder)
    if not names:
        raise PictureError(f"--images={folder} holds no picture: give a folder of {', '.join(ENDINGS)}")
    if strange := [name for name in names if name.encode(errors="ignore").decode() != name]:
        raise PictureError(f"--images={folder}: the name {strange[0]!r} is not UTF-8: rename the picture")
    if len(names) != len(captions):
        raise PictureError(
            f"{file} has {len(captions)} prompts and {folder} {len(names)} pictures: write one line per picture, in "
            'the order of their names, or a .jsonl file of {"file": ..., "prompt": ...}'
        )
    return [Picture(name, row, read(folder / name).shape[1::-1]) for name, row in zip(names, captions, strict=True)]


def pictures_in(folder: Path) -> list[str]:
    """Names of the pictures directly in `folder`, sorted as text: 09.png, 10.png, 9.png."""
    return sorted(f.name for f in folder.iterdir() if f.suffix.lower() in ENDINGS)


def read(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    """A picture as 8-bit RGB, read as the rewards' references do: transparency and EXIF rotation are ignored.

    Of an animation, the first frame. Raises PictureError.
    """
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise PictureError(f"{file} has more than 8 bits a channel ({image.mode}): save it as 8-bit RGB")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise PictureError(f"{file} does not exist: name the pictures as they are in the folder of --images") from None
    except PictureError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:  # what Pillow raises
        raise PictureError(
            f"{file} cannot be read as a picture ({(str(e) or type(e).__name__).splitlines()[0]}): save it again"
        ) from e


# --- scores ---------------------------------------------------------------------------------------------------------


def score_files(
    score: Score,
    towers: dict[str, Params],
    pictures: Sequence[Picture],
    folder: Path,
    chunk: int,
    asked: Asked = NONE,
) -> dict[str, Float[np.ndarray, "n"]]:
    """Each reward's scores of n pictures; a batch has at most `chunk` pictures, all of one size. Of rewards that a
    picture's prompt does not ask for they mean nothing.

    Raises ConfigError if a reward cannot read a prompt or pictures of some size.
    """
    scores = {name: np.zeros(len(pictures), np.float32) for name in score.names}
    # Finds unreadable prompts before the first chunk.
    rewards.tokenize(score, [p.prompt for p in pictures], [p.row for p in pictures], asked)
    for size in dict.fromkeys(p.size for p in pictures):
        places = [i for i, p in enumerate(pictures) if p.size == size]
        together = min(chunk, len(places))
        for start in range(0, len(places), together):
            some = places[start : start + together]
            full = [*some, *[some[-1]] * (together - len(some))]  # one shape, compiled once
            images = np.stack([read(folder / pictures[i].name) for i in full])
            rows, mine = [pictures[i].row for i in full], {name: one[full] for name, one in asked.items()}
            for name, values in score_arrays(score, towers, images, rows, mine).items():
                scores[name][some] = values[: len(some)]
    return scores


def score_arrays(
    score: Score,
    towers: dict[str, Params],
    images: UInt8[np.ndarray, "B H W 3"],
    rows: Sequence[Row],
    asked: Asked = NONE,
) -> dict[str, Float[np.ndarray, "B"]]:
    """Each reward's scores of B pictures with one row each. Raises ConfigError as `score_files`."""
    tokens, floats = rewards.tokenize(score, [r["prompt"] for r in rows], rows, asked), images.astype(np.float32) / 255
    found = {name: x[:, 0] for name, x in rewards.score_on_host(score, images[:, None], rows, asked)[1].items()}
    for reward in score.rewards:
        if reward.host is not None:
            continue
        try:
            found[reward.name] = np.asarray(_jitted(reward.score)(towers[reward.name], floats, tokens[reward.name]))
        except own.RewardError:
            raise
        except ValueError as e:  # about shapes, while the program is traced
            height, width = images.shape[1:3]
            raise ConfigError(f"reward {reward.name} cannot score pictures of {width}x{height}: {e}") from e
    return found


_jitted = functools.lru_cache(jax.jit)


# --- results --------------------------------------------------------------------------------------------------------


def table(pictures: Sequence[Picture], scores: dict[str, Float[np.ndarray, "n"]], asked: Asked = NONE) -> list[str]:
    """A header, one line per picture, and the means; a reward's are of the pictures whose prompts ask for it."""
    width = max(len("picture"), *(len(p.name) for p in pictures))
    prompts = [p.prompt if len(p.prompt) <= 40 else f"{p.prompt[:37]}..." for p in pictures]
    room = max(len("prompt"), *map(len, prompts))

    def line(name: str, prompt: str, cells: Sequence[str]) -> str:
        padded = (f"{cell:>{max(10, len(reward))}}" for cell, reward in zip(cells, scores, strict=True))
        return "  ".join([f"{name:{width}}", f"{prompt:{room}}", *padded])

    means = {name: values[asked[name] > 0] if name in asked else values for name, values in scores.items()}
    return [
        line("picture", "prompt", list(scores)),
        *(line(p.name, prompts[i], cells(scores, asked, i, ".4f")) for i, p in enumerate(pictures)),
        line("mean", "", [f"{values.mean():.4f}" if len(values) else "" for values in means.values()]),
    ]


def cells(scores: dict[str, Float[np.ndarray, "n"]], asked: Asked, i: int, digits: str) -> list[str]:
    """Picture i's scores as texts; empty for a reward that its prompt does not ask for."""
    return [f"{x[i]:{digits}}" if name not in asked or asked[name][i] else "" for name, x in scores.items()]


def write_csv(
    file: Path, pictures: Sequence[Picture], scores: dict[str, Float[np.ndarray, "n"]], asked: Asked = NONE
) -> Path:
    """A header "file,prompt,<reward>..." and one line per picture, with all digits of float32; no means. The cell of a
    reward that the picture's prompt does not ask for is empty. A command that is stopped leaves the file of before."""
    text = io.StringIO(newline="")
    out = csv.writer(text)
    out.writerow(["file", "prompt", *scores])
    for i, picture in enumerate(pictures):
        out.writerow([picture.name, picture.prompt, *cells(scores, asked, i, ".9g")])
    with disk.whole(file) as f:
        f.write(text.getvalue().encode())
    return file
