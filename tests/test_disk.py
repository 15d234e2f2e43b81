"""Files that are there whole or not at all, of the mode that the umask says; and files that cannot be read."""

import os
import stat

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import results
from solrl_jax import disk, weights
from solrl_jax.config import Lora
from solrl_jax.run import checkpoint, pictures, score
from solrl_jax.weights import Rule, lora_files

KEYS = (Rule(r"(.+)/kernel", r"\1.weight", "linear"),)
SHOWN = pictures.Shown(["a"], np.zeros((1, 8, 8, 3), np.uint8), {}, {})


def write_lora(file):
    lora_files.save(file, {"to_q": {"a": jnp.ones((4, 2)), "b": jnp.ones((2, 4))}}, KEYS, Lora(2, 2.0))


def write_weights(file):
    weights.save({"to_q": {"kernel": jnp.ones((4, 2))}}, KEYS, file)


WRITERS = {
    "model.safetensors": write_weights,
    "lora.safetensors": write_lora,
    "base.npz": lambda file: pictures.save(file, SHOWN, 0, "how"),
    "000000.png": lambda file: pictures.write_grid(file, SHOWN.prompts, {"base": SHOWN.images}),
    "figures.json": lambda file: results.record(file, {"one": results.figure(1.0, "s", 1)}),
    "scores.csv": lambda file: score.write_csv(file, [score.Picture("a.png", {"prompt": "a"}, (8, 8))], {}),
    "text.json": lambda file: checkpoint.replace(file, "{}"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_readable_as_the_umask_says(tmp_path, name):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            WRITERS[name](tmp_path / f"{mask}-{name}")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / f"{mask}-{name}").stat().st_mode) == mode


def test_a_link_to_nothing_is_no_folder_to_write_in(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for folder in (tmp_path / "link", tmp_path / "link" / "run"):
        assert disk.unwritable(folder) == f"{tmp_path / 'link'} is a link to nothing"
    (tmp_path / "gone").mkdir()
    assert disk.unwritable(tmp_path / "link" / "run") == ""
    assert disk.unwritable(tmp_path / "new" / "link") == ""  # of a link's name, in a folder that is made


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_synced_before_it_has_its_name_and_a_full_disk_leaves_the_old_one(tmp_path, name, monkeypatch):
    file = tmp_path / name
    WRITERS[name](file)
    size, sync, seen = file.stat().st_size, os.fsync, []

    def watched(handle):
        seen.append((file.exists(), os.fstat(handle).st_size))
        sync(handle)

    file.unlink()
    monkeypatch.setattr(os, "fsync", watched)
    WRITERS[name](file)
    assert seen == [(False, size)] and file.stat().st_size == size

    def full(handle):
        raise OSError(28, "No space left on device")

    file.write_bytes(b"as it was")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        WRITERS[name](file)
    assert file.read_bytes() == b"as it was" and list(tmp_path.iterdir()) == [file]
