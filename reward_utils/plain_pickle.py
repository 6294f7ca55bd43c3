"""Pickle reduced to plain data, for servers that speak nothing else: no class is looked up, no code can run."""

from __future__ import annotations

import io
import pickle

PLAIN = (type(None), bool, int, float, str, bytes)
MAX_DEPTH = 16


def dumps(value: object) -> bytes:
    """Pickle numbers, strings, bytes, lists and dicts, protocol 4.

    Raises:
        TypeError: for anything else, subclasses such as numpy.str_ too; the message holds the place.
    """
    _check(value, "request", TypeError)
    return pickle.dumps(value, protocol=4)


def loads(data: bytes) -> object:
    """Read what `dumps` can write; everything else is refused before it is built.

    Raises:
        ValueError: for a class, a persistent reference, another type, or damaged data.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything; all of it means: not plain data
        raise ValueError(f"refused a pickle: {error}") from None
    _check(value, "reply", ValueError)
    return value


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only plain data is read")

    def persistent_load(self, pid: object):
        raise pickle.UnpicklingError("it refers to data outside of it")


def _check(value: object, place: str, error: type[Exception], depth: int = 0) -> None:
    kind = type(value)
    if depth > MAX_DEPTH:
        raise error(f"{place} is nested deeper than {MAX_DEPTH}")
    if kind is list:
        for index, item in enumerate(value):
            _check(item, f"{place}[{index}]", error, depth + 1)
    elif kind is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise error(f"{place} has a key of type {type(key).__name__}, expected str")
            _check(item, f"{place}[{key!r}]", error, depth + 1)
    elif kind not in PLAIN:
        raise error(
            f"{place} is a {kind.__module__}.{kind.__qualname__}, expected numbers, strings, bytes, lists, dicts"
        )
