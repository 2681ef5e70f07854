"""Read pickled arrays without running what a pickle may say: only plain containers and NumPy's arrays are built.

Raw BridgeData V2 and its processed copies are pickles. Unpickling calls any function that a file names, so a downloaded
file could do anything; here it may name what rebuilds arrays, and nothing else.
"""

import pickle
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from wfm_core.data.files import DataError

_ALLOWED = {
    ("_codecs", "encode"),  # how protocol 2 and below keep bytes
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    # Before NumPy 2 the package was named numpy.core.
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
}
_READABLE = (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, pickle.UnpicklingError)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"names {module_name}.{global_name}, only arrays are read")
        return super().find_class(module_name.replace("numpy.core", "numpy._core"), global_name)


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
