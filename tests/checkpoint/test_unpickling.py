"""Pickles and archives made to exhaust or to mislead: every one is an error, none a crash."""

from __future__ import annotations

import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from stts_export.checkpoint.torch_files import TensorPlace, saved_object
from stts_export.checkpoint.unpickling import (
    DICT,
    IGNORED,
    RECORD,
    SHAPE,
    Known,
    records_from_pickle,
)
from stts_export.errors import InputError
from tests.checkpoint.olmo_folders import olmo_state, write_sharded, write_unsharded
from tests.helpers import random_model

_KNOWN: Known = {
    ("m", "Record"): RECORD,
    ("m", "Dict"): DICT,
    ("m", "Size"): SHAPE,
    ("m", "nothing"): IGNORED,
    ("m", "count"): lambda *arguments: len(arguments),
}
_FILE = Path("file")


def _read(data: bytes) -> Any:
    return records_from_pickle(data, _KNOWN, _FILE)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_containers_are_read(protocol: int):
    value: dict[str, Any] = {"a": [1, 2.5, None, True], "b": ((1, 2), "x", 2**40), "c": {}}
    if protocol > 3:
        value |= {"d": b"y", "e": {1, 2}, "f": frozenset({3})}
    assert _read(pickle.dumps(value, protocol)) == value


# Hashing nested tuples needs stack; shared ones need time that doubles with each level.
_DEEP = b"\x80\x02})" + b"\x85" * 3_000_000 + b"K\x01s."
_SHARED = b"\x80\x02}K\x01\x85" + b"q\x00h\x00\x86" * 60 + b"K\x01s."
_RECURSIVE_LISTS = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."


@pytest.mark.parametrize(("data", "problem"), [
    (_DEEP, "tuples of more than"),
    (_SHARED, "tuples of more than"),
    (b"\x80\x02Nr\xff\xff\xff\x1f.", "place 536870911"),
    (b"\x80\x02Np\xff", "cannot be read"),
    (b"\x80\x02(q\x00.", "takes a mark"),
    (b"\x80\x04\x96" + b"\xff" * 8 + b".", "cannot be read"),
    (b"\x80\x02X\xff\xff\xff\x7f.", "cannot be read"),
    (b"\x80\x02h\x07.", "KeyError"),
    (b"\x80\x02a.", "IndexError"),
    (b"I1\n.", "INT in a pickle of plain data"),
    (b"\x80\x02N", "cannot be read"),
    # A list of a million copied into shapes, or a dictionary into another.
    (b"\x80\x02cm\nSize\n](K\x01K\x01K\x01" + b"K\x01" * 100 + b"e\x85R.", "is no shape"),
    (b"\x80\x02cm\nSize\n]]a\x85R.", "is no shape"),
    (b"\x80\x02cm\nDict\n}\x85R.", "TypeError"),
    (b"\x80\x02cm\nRecord\n)\x81(NN\x86b.", "cannot be read"),
    (b"\x80\x02cm\nRecord\n)\x81}X\x09\x00\x00\x00__class__Nsb.", "no names of attributes"),
], ids=range(16))  # fmt: skip
def test_what_would_exhaust_or_mislead_is_refused(data: bytes, problem: str):
    with pytest.raises(InputError, match="file: cannot be read") as error:
        _read(data)
    assert problem in str(error.value)


def test_a_long_pickle_is_refused_unread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stts_export.checkpoint.unpickling.MAX_BYTES", 10)
    with pytest.raises(InputError, match="a pickle of 17 bytes"):
        _read(b"\x80\x02" + b"N" * 14 + b".")


def test_deep_lists_are_an_error_or_a_value_but_no_crash():
    assert isinstance(_read(_RECURSIVE_LISTS), list)


def test_a_stand_in_that_a_pickle_changes_is_its_own():
    # State (None, {"x": 1}) sets an attribute of the function, or class, that was named.
    for name in ("count", "nothing", "Record", "Dict", "Size"):
        attack = f"cm\n{name}\n".encode() + b"N}X\x01\x00\x00\x00xK\x01s\x86b."
        known = dict(_KNOWN)
        found = None
        try:
            found = records_from_pickle(b"\x80\x02" + attack, known, _FILE)
        except InputError:
            assert name in ("Record", "Dict")
        again = _read(f"\x80\x02cm\n{name}\n.".encode("latin1"))
        assert again is not found
        assert not hasattr(again, "x")
        assert not hasattr(known["m", name], "x")


# Archives of torch.save.


def _archive(file: Path, pickled: bytes, **options: Any) -> Path:
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", struct.pack("<2f", 1, 2), zipfile.ZIP_STORED)
    return file


class _Pickler(pickle.Pickler):
    """As torch.save's: a storage is an id; here any id, in place of `...`."""

    pid: Any = ("storage", torch.FloatStorage, "0", "cpu", 2)

    def persistent_id(self, value: object) -> Any:
        return self.pid if value is Ellipsis else None


class _Tensor:
    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild = torch._utils._rebuild_tensor_v2
        return rebuild, (..., *self.arguments)


def _saved(file: Path, *arguments: Any, pid: Any = _Pickler.pid) -> Path:
    with (file.parent / "pickle").open("w+b") as opened:
        pickler = _Pickler(opened, 2)
        pickler.pid = pid
        pickler.dump({"a": _Tensor(*arguments)})
        opened.seek(0)
        return _archive(file, opened.read())


def test_an_archive_made_here_is_read(tmp_path: Path):
    place = saved_object(_saved(tmp_path / "f.pt", 0, (2,), (1,), False, {}))["a"]
    assert isinstance(place, TensorPlace)
    assert place.load().tolist() == [1, 2]


@pytest.mark.parametrize(("arguments", "problem"), [
    ((0, (2,), (1,), False, {}, {"neg": True}), "a tensor with {'neg': True}"),
    ((0, (10**13,), (0,), False, {}), "ends outside its storage"),
    ((0, (2,), (1.0,), False, {}), "no tensor has shape"),
    ((0, [2], [1], False, {}), "no tensor has shape"),
    ((1, (2,), (1,), False, {}), "ends outside its storage"),
    ((0,), "TypeError"),
])  # fmt: skip
def test_tensors_that_are_none_are_refused(tmp_path: Path, arguments: Any, problem: str):
    with pytest.raises(InputError, match="cannot be read") as error:
        saved_object(_saved(tmp_path / "f.pt", *arguments))
    assert problem in str(error.value)


@pytest.mark.parametrize("pid", [
    ("storage", torch.FloatStorage, "0", "cpu", 2.0),
    ("storage", torch.FloatStorage, "0", "cpu"),
    ("storage", "float", "0", "cpu", 2),
    ("storage", torch.FloatStorage, "7", "cpu", 2),
    ("storage", torch.FloatStorage, "0", "cpu", -2),
    ("module", torch.FloatStorage, "0", "cpu", 2),
])  # fmt: skip
def test_ids_that_are_no_storage_are_refused(tmp_path: Path, pid: Any):
    with pytest.raises(InputError, match="cannot be read"):
        saved_object(_saved(tmp_path / "f.pt", 0, (2,), (1,), False, {}, pid=pid))


def test_a_negative_view_is_refused(tmp_path: Path):
    torch.save({"a": torch._neg_view(torch.ones(3))}, tmp_path / "f.pt")
    with pytest.raises(InputError, match=r"a tensor with \{'neg': True\}"):
        saved_object(tmp_path / "f.pt")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_pickle_is_refused(tmp_path: Path, method: int):
    file = _archive(tmp_path / "f.pt", pickle.dumps({}, 2) + bytes(10**6), compression=method)
    with pytest.raises(InputError, match=r"data\.pkl is compressed"):
        saved_object(file)


@pytest.mark.parametrize(("offset", "value"), [
    (8, 1), (10, 99), (6, 99), (20, 0xFF), (16, 0), (42, 0xFF),
], ids=["encrypted", "method", "version", "size", "checksum", "place"])  # fmt: skip
def test_a_damaged_directory_is_refused(tmp_path: Path, offset: int, value: int):
    file = _archive(tmp_path / "f.pt", pickle.dumps({}, 2))
    data = bytearray(file.read_bytes())
    data[data.index(b"PK\x01\x02") + offset] = value
    file.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        saved_object(file)


_FUZZ = """
import random, resource, shutil, sys
from pathlib import Path
import torch
from stts_export.checkpoint import check_tensors, open_checkpoint
from stts_export.errors import InputError
resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
good = open_checkpoint(folder).tensors
places = [t.load.__self__ for t in good.values()]
places = [p for place in places for p in getattr(place, "pieces", [(0, place)])]
held = [range(p.start, p.start + p.values * p.dtype.itemsize) for _, p in places if p.file == file]
good = {name: tensor.load().clone() for name, tensor in good.items()}
whole = file.read_bytes()
choose = random.Random(5)
ends = min(len(whole), 20_000)
for _ in range(int(sys.argv[3])):
    while True:
        at = choose.choice([choose.randrange(ends), len(whole) - 1 - choose.randrange(ends)])
        if not any(at in values for values in held):  # these have no checksum that is looked at
            break
    damaged = bytearray(whole)
    damaged[at] = choose.randrange(256)
    file.write_bytes(damaged)
    try:
        found = open_checkpoint(folder)
        check_tensors(found)
    except InputError:
        continue
    assert all(torch.equal(found.tensors[name].load(), good[name]) for name in good), at
"""


@pytest.mark.parametrize("name", ["model_and_optim/.metadata", "model_and_optim/__0_0.distcp",
                                  "model.pt"])  # fmt: skip
def test_a_changed_byte_is_an_error_or_without_effect(tmp_path: Path, name: str):
    model = random_model()
    write = write_unsharded if name == "model.pt" else write_sharded
    folder = write(tmp_path / "step1", olmo_state(model))
    command = [sys.executable, "-c", _FUZZ, str(folder), str(folder / name), "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
