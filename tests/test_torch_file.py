"""torch's checkpoints without torch: exact tensors, nothing run, and what is said of files that are no such thing."""

import collections
import io
import json
import os
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from solrl_jax import weights
from solrl_jax.weights import Files, WeightsError, torch_file

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def tensors():
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    every = {name: torch.tensor([[0.1, 1, 2], [3, -4.5, 1e4]]).to(getattr(torch, name)) for name in DTYPES}
    views = {"base": base, "turned": base.T, "rows": base[1:3], "steps": base[::2, 1::3], "one": base[2, 3]}
    empty = {"empty": torch.zeros(0, 3), "same": base.expand(2, 4, 6), "scalar": torch.tensor(2.5)}
    return every | views | empty | {"parameter": torch.nn.Parameter(base + 0.5)}


def numbers(tensor):
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        x = numbers(x)
        assert (ours[key].dtype, ours[key].shape) == (x.dtype, x.shape), key
        assert ours[key].tobytes() == x.tobytes(), key


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.pt", "a b.pth", "pytorch_model.bin"])
def test_every_dtype_and_view(tmp_path, name):
    torch.save(tensors(), tmp_path / name)
    identical(torch_file.read(tmp_path / name), tensors())


def test_what_surrounds_a_state_dict(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))  # its state dict carries _metadata
    state = module.state_dict()
    for found in (state, {"epoch": 3, "name": "x", "state_dict": state, "best": 0.5}):
        torch.save(found, tmp_path / "model.pt")
        identical(torch_file.read(tmp_path / "model.pt"), dict(state))


def test_files(tmp_path):
    """Beside each other safetensors win; alone a .bin serves, as does an index of several, and any one file by name."""
    bins = {key: x for key, x in tensors().items() if key in ("base", "turned", "bfloat16")}
    torch.save(bins, tmp_path / "pytorch_model.bin")
    files = Files(tmp_path, "model")
    assert {key: files.shape(key) for key in files.keys()} == {"base": (4, 6), "turned": (6, 4), "bfloat16": (2, 3)}  # noqa: SIM118
    identical({key: files[key] for key in bins}, bins)
    torch.save({"other": torch.ones(3)}, tmp_path / "given.pt")
    identical({"other": Files(tmp_path / "given.pt")["other"]}, {"other": torch.ones(3)})

    torch.save({"base": bins["base"]}, tmp_path / "pytorch_model-1.bin")
    torch.save({"turned": bins["turned"]}, tmp_path / "pytorch_model-2.bin")
    where = {"base": "pytorch_model-1.bin", "turned": "pytorch_model-2.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    files = Files(tmp_path, "model")
    identical({key: files[key] for key in where}, {key: bins[key] for key in where})
    save_file({"s": np.ones(2)}, tmp_path / "model.safetensors")
    assert list(Files(tmp_path, "model").keys()) == ["s"]
    torch.save(bins, tmp_path / "diffusion_pytorch_model.bin")
    assert Files(tmp_path, "diffusion_pytorch_model").shape("turned") == (6, 4)


def test_a_tensor_is_read_when_it_is_asked_for(tmp_path):
    """Shapes come from the description, and one tensor of eight takes an eighth of the memory."""
    size = 1 << 20
    torch.save({str(i): torch.full((size,), float(i)) for i in range(8)}, tmp_path / "model.pt")
    tracemalloc.start()
    files = Files(tmp_path / "model.pt")
    assert [files.shape(str(i)) for i in range(8)] == [(size,)] * 8
    assert tracemalloc.get_traced_memory()[1] < size / 4
    found = files["3"]
    files.close()
    assert (tracemalloc.get_traced_memory()[1], found.min(), found.max()) == (pytest.approx(4 * size, rel=0.1), 3, 3)
    tracemalloc.stop()
    assert found.flags.owndata  # no hold on the file


# --- what is refused ------------------------------------------------------------------------------------------------


class Payload:
    """What it pickles to is a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("depth", ["alone", "leaf", "beside the state dict"])
def test_nothing_runs(tmp_path, depth):
    mark = tmp_path / "it ran"
    payload = Payload(os.mkdir, str(mark))
    tree = {"alone": payload, "leaf": {"w": torch.ones(2), "x": payload}}.get(
        depth, {"state_dict": {"w": torch.ones(2)}, "optimizer": payload}
    )
    torch.save(tree, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"model.pt asks for posix\.mkdir, which is not part of a tensor"):
        torch_file.read(tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"asks for posix\.mkdir"):
        Files(tmp_path / "model.pt")
    assert not mark.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the payload is a real one
    assert mark.is_dir()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, r"builtins\.eval|__builtin__\.eval"),
        (getattr, r"\w+\.getattr"),
        (io.open, r"_?io\.open"),  # its module is _io from Python 3.12 on
        (torch.load, r"torch\.serialization\.load"),
        (torch._utils._rebuild_tensor, r"torch\._utils\._rebuild_tensor,"),
        (collections.OrderedDict.fromkeys, r"\w+\.getattr"),
    ],
)
def test_names_that_are_refused(tmp_path, function, name):
    torch.save({"x": Payload(function, "1")}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=f"asks for ({name})"):
        torch_file.read(tmp_path / "model.pt")


def write_zip(file, data, **storages):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, raw in storages.items():
            archive.writestr(f"archive/data/{name[1:]}", raw)


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def by_hand(shape=(2, 3), strides=(3, 1), offset=0, count=6, name="0", then=b""):
    """The pickle of {"x": one tensor}; `then` may follow the tensor."""
    storage = b"(Vstorage\nctorch\nFloatStorage\nV" + name.encode() + b"\nVcpu\nI%d\ntQ" % count
    ints = [b"(" + b"".join(b"I%d\n" % n for n in each) + b"t" for each in (shape, strides)]
    return b"\x80\x02}Vx\n" + TENSOR + b"(" + storage + b"I%d\n" % offset + ints[0] + ints[1] + b"tR" + then + b"s."


def test_by_hand(tmp_path):
    """The pickle that the next tests bend is right as it stands."""
    raw = np.arange(6, dtype=np.float32)
    write_zip(tmp_path / "model.pt", by_hand(), _0=raw.tobytes())
    np.testing.assert_array_equal(torch_file.read(tmp_path / "model.pt")["x"], raw.reshape(2, 3))


@pytest.mark.parametrize(
    "bent",
    [
        {"shape": (2, 4)},
        {"offset": 1},
        {"offset": -1},
        {"strides": (4, 1)},
        {"strides": (-3, 1)},
        {"count": 7},
        {"name": "1"},
        {"shape": (-2, 3)},
        {"strides": (3,)},
        {"then": b"}Vshape\nI1\nsb"},  # sets an attribute of the tensor
        {"then": b"0" + TENSOR + b"}V__wrapped__\nI1\nsb"},  # or of what builds them
        {"then": b"(tR"},  # calls the tensor
    ],
)
def test_views_that_reach_beyond_and_other_mischief(tmp_path, bent):
    write_zip(tmp_path / "model.pt", by_hand(**bent), _0=np.arange(6, dtype=np.float32).tobytes())
    with pytest.raises(WeightsError, match=r"model.pt (is not a complete file of torch.save|holds a \w+ as 'x')"):
        torch_file.read(tmp_path / "model.pt")


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated(tmp_path, part):
    file = tmp_path / "pytorch_model.bin"
    torch.save(tensors(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(
        WeightsError, match=r"pytorch_model.bin is not a complete file of torch.save .*download it again"
    ):
        Files(tmp_path, "model")


def test_no_checkpoints(tmp_path):
    file = tmp_path / "model.pt"

    def said():
        with pytest.raises(WeightsError) as e:
            torch_file.read(file)
        return str(e.value)

    file.write_text("<!DOCTYPE html><p>Sign in")
    assert "is not a checkpoint of torch.save (it begins with b'<!DOCTYPE html')" in said()
    torch.save(tensors(), file, _use_new_zipfile_serialization=False)
    assert "is in torch's format before version 1.6: save it again with torch.save" in said()
    torch.save([torch.ones(2)], file)
    assert "holds a list, not a dict of tensors" in said()
    torch.save({"w": torch.ones(2), "epoch": 3}, file)
    assert "holds a int as 'epoch', but only named tensors are allowed" in said()
    torch.save({"visual": {"w": torch.ones(2)}}, file)
    assert "holds a dict as 'visual'" in said()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "x")
    assert "is a zip file without data.pkl" in said()
    torch.save({"w": torch.ones(2)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "is compressed" in said()


def test_a_big_endian_file_is_refused(tmp_path):
    """Its numbers would be read with their bytes in the wrong order."""
    torch.save({"w": torch.ones(2)}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as old, zipfile.ZipFile(tmp_path / "model.pt", "w") as new:
        for name in old.namelist():
            swapped = {"whole/byteorder": b"big", "whole/data/0": np.ones(2, ">f4").tobytes()}
            new.writestr(name, swapped.get(name, old.read(name)))
    np.testing.assert_array_equal(torch.load(tmp_path / "model.pt")["w"], 1)
    with pytest.raises(WeightsError, match=r"model.pt is from a big-endian machine, .*: save it again with torch"):
        torch_file.read(tmp_path / "model.pt")


def test_load_through_the_table(tmp_path):
    """The table's checks hold for pickles too: here a wrong shape and a key too many, before any tensor is read."""
    import jax

    torch.save({"head.weight": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(1)}, tmp_path / "model.pt")
    rules = [weights.Rule("head/kernel", "head.weight", "linear")]
    spec = {"head": {"kernel": jax.ShapeDtypeStruct((3, 2), np.float32)}}
    found = weights.load(Files(tmp_path / "model.pt"), spec, rules, droppable=("step",))
    np.testing.assert_array_equal(found["head"]["kernel"], [[0, 3], [1, 4], [2, 5]])
    spec = {"head": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)}}
    with pytest.raises(WeightsError, match=r"(?s)model.pt does not hold .*unused step.*\(3, 2\), not \(2, 3\)"):
        weights.load(Files(tmp_path / "model.pt"), spec, rules)
