"""Checkpoints of torch.save (.pt, .pth, .bin) without torch, and without running code from the pickle.

Such a file is a zip: <root>/data.pkl describes the tensors, <root>/data/<name> are their storages, raw and not
compressed. A pickle can call any function of any module by its name. This reader knows only the few names that build
tensors, which here only build descriptions of them; every other name is refused.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from solrl_jax.structs import WeightsError

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "REDUCE", "BUILD", "GLOBAL", "STACK_GLOBAL"),
    "BINPERSID",
    *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE"),
    *("SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2"),
    *("TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
}
_ZIP, _OLD = b"PK\x03\x04", bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch's magic number, itself a pickle


def is_checkpoint(file: Path) -> bool:
    """Whether the file is a checkpoint of torch.save, by its name."""
    return file.suffix in (".bin", ".pt", ".pth", ".ckpt")


def read(file: str | Path) -> dict[str, np.ndarray]:
    """{key: tensor} of a state dict, which may be the entry "state_dict" or "model" of the file.

    The arrays are memory-mapped, so a tensor is read when it is first used. Raises WeightsError for a file that is
    damaged, that asks for anything but tensors, or whose state dict holds something else.
    """
    file = Path(file)
    with file.open("rb") as f:
        start = f.read(len(_OLD))
    if start == _OLD:
        raise WeightsError(
            f"{file} is in torch's format before version 1.6: save it again with "
            f'torch.save(torch.load("{file.name}", weights_only=True), "{file.name}")'
        )
    if not _ZIP.startswith(start[:4]):
        raise WeightsError(f"{file} is not a checkpoint of torch.save (it begins with {start!r}): download it again")
    try:
        return _read(file)
    except WeightsError:
        raise
    except Exception as e:  # zipfile, pickle and numpy raise nearly anything for damaged bytes
        raise WeightsError(f"{file} is not a complete file of torch.save ({e!r}): download it again") from e


def _read(file: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(file) as archive:
        main = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if main is None:
            raise WeightsError(f"{file} is a zip file without data.pkl, not a checkpoint of torch.save")
        storages = _storages(file, archive, main.removesuffix(".pkl") + "/")
        if archive.getinfo(main).compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"{file} is compressed, which torch.save never does: unpack it, zip it again with -0")
        order = main.removesuffix("data.pkl") + "byteorder"  # torch writes it since version 2.1
        if order in archive.namelist() and archive.getinfo(order).file_size < 9 and archive.read(order) == b"big":
            raise WeightsError(
                f"{file} is from a big-endian machine, whose numbers are not read here: save it again with torch on "
                "this one, or get the weights as safetensors"
            )
        described = archive.read(main)
        _check_opcodes(described, file)
        found = _Unpickler(io.BytesIO(described), file).load()
    if isinstance(found, dict):  # the other entries are epochs, names, an optimiser
        found = next((found[name] for name in ("state_dict", "model") if isinstance(found.get(name), dict)), found)
    if not isinstance(found, dict):
        raise WeightsError(f"{file} holds a {type(found).__name__}, not a dict of tensors")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, _Tensor):
            raise WeightsError(f"{file} holds a {type(value).__name__} as {key!r}, but only named tensors are allowed")
    return {key: _array(tensor, storages) for key, tensor in found.items()}


def _storages(file: Path, archive: zipfile.ZipFile, folder: str) -> dict[str, np.ndarray]:
    """The bytes of each storage under `folder`, mapped."""
    whole, found = np.memmap(file, np.uint8, "r"), {}
    for entry in archive.infolist():
        if not entry.filename.startswith(folder):
            continue
        if entry.compress_type != zipfile.ZIP_STORED:
            raise WeightsError(f"{file} is compressed, which torch.save never does: unpack it, zip it again with -0")
        # An entry's header is 30 bytes, a name and padding; the last two numbers in the header are their lengths.
        header = whole[entry.header_offset : entry.header_offset + 30].tobytes()
        begin = entry.header_offset + 30 + sum(int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
        found[entry.filename.removeprefix(folder)] = whole[begin : begin + entry.file_size]
    return found


def _check_opcodes(data: bytes, file: Path) -> None:
    """WeightsError for opcodes that torch.save never writes.

    Some opcodes make the reader reserve as much memory as they state: a memo index of 2^31, 2^60 bytes.
    """
    for place, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        if opcode.name not in _OPCODES or ("PUT" in opcode.name and (argument or 0) > place):
            what = opcode.name if argument is None else f"{opcode.name} {str(argument)[:20]!r}"
            raise WeightsError(f"{file} is not a state dict of torch.save: its pickle has {what}. Nothing was run")


class _Storage(NamedTuple):
    kind: str  # a key of _DTYPES
    name: str
    count: int


class _Tensor(NamedTuple):
    """Offset and strides in elements, as torch counts."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds only dicts, numbers, strings, _Tensors and local functions, so a pickle cannot reach objects of ours.

    numpy's dtypes and arrays, which a pickle could modify, are made only afterwards.
    """

    def __init__(self, data: Any, file: Path):
        super().__init__(data)
        self.file = file
        self.known = {
            "collections.OrderedDict": OrderedDict,
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, shape, strides, *_: _Tensor(
                storage, offset, shape, strides
            ),
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
            **{f"torch.{kind}": kind for kind in _DTYPES},
        }

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") not in self.known:
            asked = full if full.isprintable() else repr(full)
            raise WeightsError(
                f"{self.file} asks for {asked}, which is not part of a tensor. No code in it was run: a pickle can do "
                f"anything. Get the weights as safetensors, or, if you trust their source, save only their state dict "
                f"with torch"
            )
        return self.known[full]

    def persistent_load(self, pid: Any) -> _Storage:
        _, kind, name, _device, count = pid
        return _Storage(kind, name, count)


def _array(tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    """A view of the storage's bytes; numpy refuses a view beyond their end."""
    (kind, name, count), offset, shape, strides = tensor
    dtype, data = _DTYPES[kind], storages[name]
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"storage {name} has {len(data)} bytes, not {count} of {dtype}")
    return np.ndarray(shape, dtype, data.data, offset * dtype.itemsize, [dtype.itemsize * s for s in strides])
