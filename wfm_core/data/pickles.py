"""Read pickled arrays without running what a pickle may say: only plain containers and NumPy's arrays are built.

Raw BridgeData V2 and its processed copies are pickles. Unpickling calls any function that a file names, so a downloaded
file could do anything; here it may name what rebuilds arrays, and nothing else. Even that is not left to NumPy, which
believes a file that says that its bytes are pointers to objects: what a file calls are the functions below.
"""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from wfm_core.data.files import DataError

_READABLE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError,
    BufferError, pickle.UnpicklingError,
)  # fmt: skip
_KIND = re.compile(r"[biufcSUO]\d*")
"""Types of elements as pickles write them; with fields, which may hold objects in disguise, they have other names."""


class _Kind:
    """In the place of numpy.dtype; of its state only the byte order is taken: sizes, fields and flags can be forged."""

    def __init__(self, name: str, align: object, copy: object) -> None:
        if not isinstance(name, str) or not _KIND.fullmatch(name):
            raise pickle.UnpicklingError(f"has elements of type {name!r}, read are numbers, texts and plain objects")
        self.dtype = np.dtype(name)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array that gets its content with its state, as pickles have it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, kind, is_fortran, content = state[-4:]
        # Not as it came: of a list that is too short NumPy reads on as far as the shape says.
        sound: Any = _filled(content, kind, shape, "F" if is_fortran else "C").__reduce__()[2]
        super().__setstate__(sound)


def _reconstruct(array_type: object, shape: object, kind: object) -> np.ndarray:
    return _Array((0,), np.uint8)  # all of it comes with its state


def _filled(content: object, kind: _Kind, shape: tuple[int, ...], order: Any) -> np.ndarray:
    content = _encode(content, "latin1") if isinstance(content, str) else content  # Python 2 had no other bytes
    if isinstance(content, list) and kind.dtype.hasobject:
        return np.fromiter(content, object).reshape(shape, order=order)
    # Not the memory of another array, which the file could have freed below it.
    if not isinstance(content, bytes | bytearray):
        raise pickle.UnpicklingError(f"has an array of {kind.dtype} made of a {type(content).__name__}")
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order)  # refuses objects


def _scalar(kind: _Kind, content: object) -> np.generic:
    return _filled(content, kind, (1,), "C")[0]


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how protocol 2 and below keep bytes; others do not occur


_CALLED: dict[tuple[str, str], object] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Kind,
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever told to _reconstruct; a text cannot be called
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _filled,
}
"""What a pickle may name -> what stands for it."""


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        # Before NumPy 2 the package was named numpy.core.
        name = re.sub(r"^numpy\.core\.", "numpy._core.", module_name), global_name
        if name not in _CALLED:
            raise pickle.UnpicklingError(f"names {module_name}.{global_name}, only arrays are read")
        return _CALLED[name]


def load_pickle(path: Path) -> Any:
    """Read a pickle of dicts, lists, tuples, strings, numbers and arrays.

    Raises:
        DataError: absent, damaged, or it names anything else; names the file. Nothing of it has been run.
    """
    try:
        with open(path, "rb") as file:
            return _load(file)
    except _READABLE as error:
        raise DataError(f"{path}: not a readable pickle of arrays ({error})") from error


def load_object_array(path: Path) -> np.ndarray:
    """Read an .npy file of objects, as `numpy.save` writes lists of dicts; otherwise as `load_pickle`.

    Raises:
        DataError: absent, damaged, or it names anything else; names the file.
    """
    try:
        with open(path, "rb") as file:
            shape, array = _object_shape(file), _load(file)
            if not isinstance(array, np.ndarray) or array.shape != shape:
                raise ValueError(f"its header says {shape}, its content does not")
    except _READABLE as error:
        raise DataError(f"{path}: not a readable array of objects ({error})") from error
    return array


def object_array_shape(path: Path) -> tuple[int, ...]:
    """Shape of an .npy file of objects, from its header alone.

    Raises:
        DataError: absent, damaged, or not of objects; names the file.
    """
    try:
        with open(path, "rb") as file:
            return _object_shape(file)
    except _READABLE as error:
        raise DataError(f"{path}: not a readable array of objects ({error})") from error


def _load(file: BinaryIO) -> Any:
    # latin1: strings of Python 2 held the bytes of arrays.
    return _ArrayUnpickler(file, encoding="latin1").load()


def _object_shape(file: BinaryIO) -> tuple[int, ...]:
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind != "O":
        raise ValueError(f"holds {dtype}, not objects")
    return shape
