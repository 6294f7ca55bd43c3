"""Pickle reduced to plain data, for servers that speak nothing else: no class is looked up, no code can run."""

from __future__ import annotations

import io
import pickle

PLAIN = (type(None), bool, int, float, str, bytes)
MAX_DEPTH = 16
MAX_VALUES = 100_000  # a request is about 64 pictures with their metadata


def dumps(value: object) -> bytes:
    """Pickle numbers, strings, bytes, lists and dicts, protocol 4.

    Raises:
        TypeError: for anything else, subclasses such as numpy.str_ too; the message holds the place.
    """
    _check(value, "request", TypeError)
    return pickle.dumps(value, protocol=4)


def loads(data: bytes) -> object:
    """Read what `dumps` can write; no class is looked up, and what else a pickle builds by itself (sets) is refused.

    Raises:
        ValueError: for a class, a persistent reference, another type, or damaged data.
    """
    try:
        value = _PlainUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything; all of it means: not plain data
        raise ValueError(f"refused a pickle: {error!r:.200}") from None
    _check(value, "reply", ValueError)
    return value


class _PlainUnpickler(pickle._Unpickler):
    """The one written in Python: its memo is a dict. The one in C allocates 16 bytes times the index a pickle names."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, and only plain data is read")

    def persistent_load(self, pid: object):
        raise pickle.UnpicklingError("it refers to data outside of it")


def _check(root: object, name: str, error: type[Exception]) -> None:
    """Raise `error` unless everything below `root` is plain; lists that hold each other count as often as seen."""
    todo = [(root, name, 0)]
    seen = 1
    while todo:
        value, place, depth = todo.pop()
        kind = type(value)
        seen += len(value) if kind in (list, dict) else 0  # before they are written down one by one
        if depth > MAX_DEPTH or seen > MAX_VALUES:
            raise error(f"{name} is nested deeper than {MAX_DEPTH} or holds more than {MAX_VALUES} values")
        if kind is list:
            todo += [(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(value)]
        elif kind is dict:
            for key in value:
                if type(key) is not str:
                    raise error(f"{place} has a key of type {type(key).__name__}, expected str")
            todo += [(item, f"{place}[{key!r}]", depth + 1) for key, item in value.items()]
        elif kind not in PLAIN:
            found = f"{kind.__module__}.{kind.__qualname__}"
            raise error(f"{place} is a {found}, expected a number, string, bytes, list or dict")
