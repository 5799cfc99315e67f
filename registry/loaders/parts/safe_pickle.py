"""Reads PyTorch and pickle files without running any code that they name.

A pickle is a program for a stack machine; Python's own machine imports and calls what the program
names. The one here rebuilds tensors, arrays, numbers, text and plain containers, and turns every
other object into a `Record`: its class's name, its arguments and its fields. No module that a file
names is imported. What a file claims to be large must be backed by bytes that are in it.

A file that names nothing but tensors is then read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import gzip
import io
import pickletools
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...errors import CheckpointError
from ...files import UnreadableError, open_regular

MAX_OPCODES = 5_000_000
MAX_GZIP_RATIO = 64
"""Weights compress by a tenth; a file of zeros, which is all that reaches this ratio, is refused."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

DTYPES: dict[str, torch.dtype] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}


class MalformedError(Exception):
    """Why a file cannot be read; `load` adds its name."""


@dataclass(eq=False)
class Record:
    """An object of a class that was not imported. `kind` is ``module.name`` of the class."""

    kind: str
    args: tuple[Any, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:  # never the content: it can be as large as the file wants it to be
        return f"Record({self.kind[:100]!r})"


@dataclass(frozen=True)
class Global:
    """A name in a pickle, for a class or a function; never looked up."""

    name: str


@dataclass(eq=False)
class Storage:
    """The numbers of one or many tensors. `flat` is on the meta device while only shapes matter."""

    numel: int
    flat: Tensor


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a record, the items of a dict, else nothing."""
    found = value.fields if isinstance(value, Record) else value
    return found if isinstance(found, dict) else {}


def load(path: str | Path, *, offset: int = 0) -> Any:
    """What a PyTorch or pickle file holds, from byte `offset` on, on the CPU.

    Zip files and the older format of `torch.save`, bare pickles, and each of them gzipped.

    Raises:
        CheckpointError: truncated, damaged, or no such file; a tensor larger than its bytes.
    """
    try:
        with open_regular(path) as file:
            if offset:
                file.seek(offset)
                return _load(io.BytesIO(file.read()))
            return _load(file)
    except (MalformedError, UnreadableError) as error:
        raise CheckpointError(
            str(path), f"it cannot be read: {error}", allowed="a whole file of torch.save or pickle"
        ) from None


def _load(file: BinaryIO, depth: int = 0) -> Any:
    start = file.tell()
    magic = file.read(4)
    file.seek(start)
    if depth > 3:
        raise MalformedError("files nested in files, four deep")
    if not magic:
        raise MalformedError("it is empty")
    if magic[:2] == b"\x1f\x8b":
        return _load(io.BytesIO(_gunzip(file.read())), depth + 1)
    if magic == b"PK\x03\x04":
        return _load_zip(file, depth)
    return _load_stream(io.BytesIO(file.read()), depth)


def _gunzip(data: bytes) -> bytes:
    limit = MAX_GZIP_RATIO * len(data) + 2**20
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
    except (OSError, EOFError, ValueError) as error:
        raise MalformedError(f"the gzip data is truncated or damaged ({error})") from None
    if len(content) > limit:
        raise MalformedError(f"it expands by more than {MAX_GZIP_RATIO} times")
    return content


# -- torch.save's zip files -------------------------------------------------------------------------


def _load_zip(file: BinaryIO, depth: int) -> Any:
    size = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
        entries = {info.filename: info for info in archive.infolist()}
    except Exception as error:  # zipfile raises struct.error, ValueError and others as well
        raise MalformedError(f"the zip archive is truncated or damaged ({error})") from None
    for info in entries.values():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise MalformedError(f"{info.filename[:80]!r} is compressed")
        if info.header_offset + info.file_size > size:
            raise MalformedError(f"{info.filename[:80]!r} is longer than the file")
    if sum(info.file_size for info in entries.values()) > size:
        raise MalformedError("its entries overlap")
    roots = [
        n[: -len("data.pkl")] for n in entries if n.endswith("/data.pkl") and n.count("/") == 1
    ]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in entries:
        raise MalformedError("it is a zip archive, but none of torch.save")
    root = roots[0]

    def read(name: str) -> bytes:
        try:
            return archive.read(root + name)
        except Exception as error:
            raise MalformedError(f"{name[:80]!r} is damaged ({error})") from None

    if f"{root}byteorder" in entries and read("byteorder") != sys.byteorder.encode():
        raise MalformedError("it was written on a machine of the other byte order")

    def storages(real: bool) -> Callable[[Any], Any]:
        known: dict[str, Storage] = {}

        def find(identity: Any) -> Any:
            _, dtype, key, numel = _storage_id(identity)
            if key not in known:
                info = entries.get(f"{root}data/{key}")
                held = 0 if info is None else info.file_size
                if held < numel * dtype.itemsize or info is None:
                    raise MalformedError(f"a tensor claims {numel:,} numbers that are not in it")
                known[key] = _storage(read(f"data/{key}"), dtype, numel, real)
            return known[key]

        return find

    program = read("data.pkl")
    machine = _Machine(storages(real=False), depth)
    machine.run(io.BytesIO(program))
    if machine.names_tensors_only and not depth:
        content = _weights_only(file)
        if content is not None:
            return content
    return _Machine(storages(real=True), depth).run(io.BytesIO(program))


def _weights_only(file: BinaryIO) -> Any:
    """What torch's own restricted reader makes of it, None where it refuses.

    Called after `_Machine` has checked every size: torch allocates what a file claims.
    """
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return None


# -- bare pickles, and torch.save's format before the zip files ---------------------------------------


def _load_stream(stream: io.BytesIO, depth: int) -> Any:
    first = _Machine(_no_storage, depth).run(stream)
    if first != LEGACY_MAGIC:
        return first
    if _Machine(_no_storage).run(stream) != LEGACY_PROTOCOL:
        raise MalformedError("its protocol is none of torch.save")
    system = fields_of(_Machine(_no_storage).run(stream))
    if system.get("little_endian") is not (sys.byteorder == "little"):
        raise MalformedError("it was written on a machine of the other byte order")
    start = stream.tell()
    claimed: dict[str, tuple[torch.dtype, int]] = {}
    left = len(stream.getbuffer()) - start

    def claim(identity: Any) -> Any:
        module, dtype, key, numel = _storage_id(identity)
        if module is not None:
            return module
        if numel * dtype.itemsize > left:
            raise MalformedError(f"a tensor claims {numel:,} numbers that are not in it")
        claimed.setdefault(key, (dtype, numel))
        return _viewed(_storage(b"", dtype, numel, real=False), identity)

    machine = _Machine(claim, depth)
    machine.run(stream)
    keys = _Machine(_no_storage).run(stream)
    known: dict[str, Storage] = {}
    for key in keys if isinstance(keys, list) else []:
        if not isinstance(key, str) or key not in claimed:
            raise MalformedError("it holds numbers of no tensor")
        dtype, numel = claimed[key]
        if int.from_bytes(stream.read(8), "little") != numel:
            raise MalformedError("a tensor's numbers are not as many as it claims")
        known[key] = _storage(stream.read(numel * dtype.itemsize), dtype, numel, real=True)
    if set(known) != set(claimed):
        raise MalformedError("numbers of a tensor are missing: it is truncated")
    if machine.names_tensors_only and not depth:
        content = _weights_only(stream)
        if content is not None:
            return content

    def find(identity: Any) -> Any:
        module, _, key, _ = _storage_id(identity)
        return module if module is not None else _viewed(known[key], identity)

    stream.seek(start)
    return _Machine(find, depth).run(stream)


def _viewed(storage: Storage, identity: Any) -> Storage:
    """The part of a storage that an identity of the older format asks for, all of it if None."""
    view = identity[5] if len(identity) > 5 else None
    if view is None:
        return storage
    _, offset, size = view
    if not (isinstance(offset, int) and isinstance(size, int)) or not (
        0 <= offset <= offset + size <= storage.numel
    ):
        raise MalformedError("a part of a storage lies outside it")
    return Storage(size, storage.flat[offset : offset + size])


def _no_storage(identity: Any) -> Any:
    raise MalformedError("it points to data that are not in it (a persistent id)")


def _storage_id(identity: Any) -> tuple[Any, torch.dtype, str, int]:
    """(class of a module or None, dtype, key, number of elements) of a persistent id."""
    if isinstance(identity, tuple) and len(identity) > 1 and identity[0] == "module":
        return identity[1], torch.uint8, "", 0
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise MalformedError("it has a persistent id that is none of torch's")
    kind, key, numel = identity[1], identity[2], identity[4]
    name = kind.name.rpartition(".")[2] if isinstance(kind, Global) else ""
    known = isinstance(key, str) and isinstance(numel, int) and 0 <= numel < 2**48
    if not known or not isinstance(kind, Global) or kind.name.partition(".")[0] != "torch":
        raise MalformedError("it has a persistent id that is none of torch's")
    if name not in DTYPES:
        raise MalformedError(f"tensors of {name[:40]} are not read")
    return None, DTYPES[name], key, numel


def _storage(data: bytes, dtype: torch.dtype, numel: int, real: bool) -> Storage:
    if not real:
        return Storage(numel, torch.empty(numel, dtype=dtype, device="meta"))
    if len(data) < numel * dtype.itemsize:
        raise MalformedError("numbers of a tensor are missing: it is truncated")
    if not numel:
        return Storage(0, torch.empty(0, dtype=dtype))
    return Storage(numel, torch.frombuffer(bytearray(data), dtype=dtype, count=numel))


# -- what a pickle may build --------------------------------------------------------------------------


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *rest: Any, dtype: Any = None
) -> Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Storage) or len(size) != len(stride) or len(size) > 16:
        raise MalformedError("a tensor has no storage or no shape")
    if not all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers):
        raise MalformedError("a tensor's shape is not made of whole numbers")
    flat, numel = storage.flat, storage.numel
    if dtype is not None and dtype is not flat.dtype:
        if not isinstance(dtype, torch.dtype) or numel * flat.itemsize % dtype.itemsize:
            raise MalformedError("a tensor's type does not fit its storage")
        numel = numel * flat.itemsize // dtype.itemsize
        flat = flat.view(dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if prod(size) and (prod(size) > numel or last >= numel):
        raise MalformedError(f"a tensor of shape {tuple(size)} is larger than its storage")
    return torch.as_strided(flat, tuple(size), tuple(stride), offset if prod(size) else 0)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    return _tensor(storage, offset, size, stride, dtype=dtype)


def _first(value: Any, *rest: Any) -> Any:
    return value


def _subclass(build: Any, kind: Any, args: Any, state: Any = None) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a subclass, as a plain one."""
    builder = BUILDERS.get(build.name) if isinstance(build, Global) else None
    if builder is None or build.name not in TENSOR_NAMES:
        return Record(_name(kind), tuple(args))
    return builder(*args)


def _encoded(text: Any, encoding: Any = "utf-8") -> bytes:
    if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
        raise MalformedError("text in an unusual encoding")
    return text.encode("latin1")


def _dict(*args: Any) -> dict[Any, Any]:
    pairs = args[0] if args and isinstance(args[0], (list, tuple)) else ()
    return {_key(key): value for key, value in pairs}


def _set(items: Iterable[Any] = ()) -> set[Any]:
    return {_key(item) for item in items}


def _list(items: Any = ()) -> list[Any]:
    return list(items) if isinstance(items, (list, tuple)) else []


def _reconstructed(kind: Any, *rest: Any) -> Record:
    return Record(_name(kind))


def _numpy_dtype(dtype: Any) -> Any:
    """The numpy dtype of a record of one: numbers and booleans only."""
    import numpy as np

    code = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    if not isinstance(code, str) or code.lstrip("<>|=")[:1] not in ("b", "i", "u", "f"):
        raise MalformedError("an array of something other than numbers")
    state = dtype.fields.get("__state__")
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "="
    try:
        return np.dtype(code).newbyteorder(order if order in ("<", ">") else "=")
    except TypeError:
        raise MalformedError("an array of an unknown type") from None


def _numpy_scalar(dtype: Any, data: Any) -> Any:
    import numpy as np

    kind = _numpy_dtype(dtype)
    if not isinstance(data, (bytes, bytearray)) or len(data) != kind.itemsize:
        raise MalformedError("a number of the wrong length")
    return np.frombuffer(data, kind)[0].item()


def _array(shape: Any, dtype: Any, data: Any, fortran: Any) -> Any:
    import numpy as np

    kind = _numpy_dtype(dtype)
    if not isinstance(data, (bytes, bytearray)) or not all(isinstance(n, int) for n in shape):
        raise MalformedError("an array without its numbers")
    if min(shape, default=0) < 0 or prod(shape) * kind.itemsize != len(data):
        raise MalformedError("an array whose numbers are not as many as it claims")
    flat = np.frombuffer(data, kind).astype(kind.newbyteorder("="))
    return flat.reshape(shape, order="F" if fortran else "C")


def _numpy_buffer(data: Any, dtype: Any, shape: Any, order: Any = "C") -> Any:
    return _array(shape, dtype, data, order == "F")


TENSOR_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "collections.OrderedDict": _dict,
    "torch.Size": _first,
}
TENSOR_NAMES = {
    *TENSOR_BUILDERS,
    *(f"torch.{name}" for name in DTYPES),
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    "torch.device",
    *(str(dtype) for dtype in DTYPES.values()),
}
BUILDERS: dict[str, Callable[..., Any]] = {
    **TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "_codecs.encode": _encoded,
    "collections.defaultdict": lambda *args: {},
    **{
        f"{module}.{name}": build
        for module in ("builtins", "__builtin__")
        for name, build in (("dict", _dict), ("list", _list), ("set", _set), ("frozenset", _set))
    },
    **dict.fromkeys(("copyreg._reconstructor", "copy_reg._reconstructor"), _reconstructed),
    **dict.fromkeys(
        ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"), _numpy_scalar
    ),
    **dict.fromkeys(
        ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"), _numpy_buffer
    ),
}
ARRAY_NAMES = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
LOAD_FROM_BYTES = "torch.storage._load_from_bytes"
VALUES = {f"torch.{name}": getattr(torch, name) for name in (
    "float16", "float32", "float64", "bfloat16", "int8", "int16", "int32", "int64", "uint8", "bool"
)}  # fmt: skip


def _name(kind: Any) -> str:
    return kind.name if isinstance(kind, Global) else type(kind).__name__


def _key(value: Any) -> Any:
    """A key of a dict. Tuples in tuples are refused: hashing them can take forever."""
    scalars = (str, int, float, bool, bytes, type(None), torch.dtype, Global, Record)
    if isinstance(value, scalars) or (
        isinstance(value, tuple) and all(isinstance(item, scalars) for item in value)
    ):
        return value
    raise MalformedError(f"a dict has a key that is a {type(value).__name__}")


# -- the machine --------------------------------------------------------------------------------------

LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
    *("BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_MARK = object()


class _Machine:
    """Runs one pickle. `persistent` gives what a persistent id stands for.

    `names_tensors_only` afterwards: whether the pickle names nothing that `weights_only` refuses.
    """

    def __init__(self, persistent: Callable[[Any], Any], depth: int = 0) -> None:
        self.persistent = persistent
        self.depth = depth
        self.names_tensors_only = True
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.copied = self.may_copy = 0

    def run(self, stream: io.BytesIO) -> Any:
        """The object that the pickle at the stream's position builds; leaves the stream behind it."""
        self.may_copy = 4 * len(stream.getbuffer()) + 2**20
        try:
            for name, argument in _opcodes(stream):
                if name == "STOP":
                    return self.stack.pop()
                self._step(name, argument)
        except MalformedError:
            raise
        except Exception as error:  # whatever a broken program makes the machine do
            raise MalformedError(
                f"the pickle is truncated or damaged ({type(error).__name__})"
            ) from None
        raise MalformedError("the pickle is truncated")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in LITERALS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name]())
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name == "LIST":
            stack.append(list(self._marked()))
        elif name == "DICT":
            stack.append(_dict(list(_pairs(self._marked()))))
        elif name == "FROZENSET":
            stack.append(_set(self._marked()))
        elif name == "APPEND":
            item = stack.pop()
            self._extend([item])
        elif name == "APPENDS":
            self._extend(self._marked())
        elif name == "ADDITEMS":
            items = self._marked()
            stack[-1].update(_set(items))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._assign([key, value])
        elif name == "SETITEMS":
            self._assign(self._marked())
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._marked()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "GLOBAL":
            stack.append(self._global(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(self._global(module, attribute))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            stack.append(self._call(function, args))
        elif name == "NEWOBJ_EX":
            named, args, function = stack.pop(), stack.pop(), stack.pop()
            made = self._call(function, args)
            if isinstance(made, Record):
                made.fields.update(fields_of(named))
            stack.append(made)
        elif name == "INST":
            args = tuple(self._marked())
            stack.append(self._call(self._global(*argument.split(" ", 1)), args))
        elif name == "OBJ":
            function, *args = self._marked()
            stack.append(self._call(function, tuple(args)))
        elif name == "BUILD":
            state = stack.pop()
            self._build(stack[-1], state)
        elif name == "PERSID":
            stack.append(self.persistent(argument))
        elif name == "BINPERSID":
            stack.append(self.persistent(stack.pop()))
        else:
            raise MalformedError(f"the pickle's instruction {name} is not read")

    def _marked(self) -> list[Any]:
        """Takes everything above the last mark, and the mark, off the stack."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise MalformedError("the pickle is damaged (a mark is missing)")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def _global(self, module: Any, attribute: Any) -> Any:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise MalformedError("the pickle is damaged (a name that is no text)")
        name = f"{module}.{attribute}"
        self.names_tensors_only &= name in TENSOR_NAMES
        return VALUES.get(name, Global(name))

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise MalformedError("the pickle is damaged (arguments that are no tuple)")
        for argument in args:
            self._copies(argument)
        name = _name(function)
        if name == LOAD_FROM_BYTES and isinstance(function, Global):
            if len(args) != 1 or not isinstance(args[0], (bytes, bytearray)):
                raise MalformedError("a nested file is no bytes")
            return _load(io.BytesIO(bytes(args[0])), self.depth + 1)
        if isinstance(function, Global) and name in BUILDERS:
            return BUILDERS[name](*args)
        return Record(name, args)

    def _build(self, target: Any, state: Any) -> None:
        if not isinstance(target, Record):
            return  # attributes of a dict or a tensor: nothing that is read
        self._copies(state)
        if target.kind in ARRAY_NAMES and isinstance(state, tuple) and len(state) == 5:
            self._copies(state[4])
            target.fields["array"] = _array(state[1], state[2], state[4], state[3])
            return
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if not all(part is None or isinstance(part, dict) for part in parts):
            target.fields["__state__"] = state
            return
        for part in map(fields_of, parts):
            target.fields.update(
                {key: value for key, value in part.items() if isinstance(key, str)}
            )

    def _copies(self, value: Any) -> None:
        """Counts what is copied: a few instructions can ask for the same large object many times."""
        if isinstance(value, (str, bytes, bytearray, list, tuple, dict, set)):
            self.copied += len(value)
            if self.copied > self.may_copy:
                raise MalformedError("the pickle asks for more copies than it has content")

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _assign(self, items: list[Any]) -> None:
        target = self.stack[-1]
        into = target.fields if isinstance(target, Record) else target
        if not isinstance(into, dict):
            raise MalformedError("the pickle is damaged (items of what is no dict)")
        into.update(_dict(list(_pairs(items))))


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def _opcodes(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count > MAX_OPCODES:
            raise MalformedError(f"the pickle has more than {MAX_OPCODES:,} instructions")
        yield opcode.name, argument
