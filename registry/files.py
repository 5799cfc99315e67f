"""Files: bounded reading of what others wrote, atomic writing, digests.

Whatever reads a file that its user may have been given uses this module: regular files only (a FIFO
or a device never ends), up to a size, as UTF-8, and JSON or YAML up to a depth. docs/security.md has
the limits.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import pickle
import re
import stat
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ConfigError, DataError

NO_CONTENTS = ("__MACOSX", "lost+found")  # folders that unpacking, and Linux, put beside data
MAX_SETTINGS_BYTES = 1 << 24  # a config, a manifest, an index, metadata
MAX_YAML_BYTES = 1 << 20  # PyYAML reads about 0.1 MB a second
MAX_DATA_BYTES = 1 << 27  # results, taxonomies, figures
MAX_NESTING = 200
MAX_CONTAINERS = 4_000_000  # lists and objects of JSON; an empty one is 3 bytes there, 64 in memory
MAX_VALUES = 1 << 24  # of JSON, by its commas; a short text is 5 bytes there, 51 in memory
MAX_LINES = 1 << 24  # of a text file; each takes about 1 µs
MAX_STREAMED = 1 << 23  # values of JSON that is read in parts; each takes about 2 µs
MAX_STREAMED_CONTAINERS = 1 << 24  # lists and objects in them, of 1 µs
MAX_STREAMED_COMMAS = 1 << 27  # in them, of 50 ns
MAX_YAML_NODES = 100_000  # after each alias is replaced by what it stands for
MAX_IMAGE_PIXELS = 64_000_000  # decoding takes up to 24 bytes a pixel
LOCK_FILENAME = ".lock"
BLOCK_BYTES = 1 << 20  # of a file that is read in parts
STALE_SECONDS = 3600.0  # a temporary file of this age is of a process that was killed


WHITE_SPACE = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()


class UnreadableError(ValueError):
    """Why the content of a file cannot be used."""


def reason(error: Exception) -> str:
    """The reason of an `OSError` or `UnreadableError`, for a message that names the file itself."""
    return str(getattr(error, "strerror", None) or error)


def why(error: Exception) -> str:
    """The first sentence of a library's error about a file, without torch's advice to read it unsafely."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is not what torch.save writes, or names code"
    text = " ".join(str(error).split())[:300]
    return text if len(text) > 2 and " " in text else f"{type(error).__name__} {text}".strip()


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file (links are followed) for reading, as bytes.

    Raises:
        OSError: it does not exist or cannot be opened.
        UnreadableError: a folder, a FIFO, a device or a socket, or no path at all.
    """
    try:
        # Without O_NONBLOCK opening a FIFO waits for a writer.
        flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, os.O_RDONLY | flags)
    except ValueError as error:  # NUL, or a lone surrogate
        raise UnreadableError(f"not a path ({error})") from None
    except IsADirectoryError:  # Windows: PermissionError
        raise UnreadableError("not a regular file") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnreadableError("not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: str | Path, max_bytes: int = MAX_SETTINGS_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises as `open_regular`, or where it is longer."""
    with open_regular(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UnreadableError(f"longer than {max_bytes:,} bytes")
    return data


def read_text(path: str | Path, max_bytes: int = MAX_SETTINGS_BYTES) -> str:
    """The same as text, of UTF-8 with or without a byte order mark."""
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def read_lines(path: str | Path, max_bytes: int) -> Iterator[str]:
    """The lines of a text file in turn, without their ends, in memory for one of them at a time.

    Raises:
        OSError: it does not exist or cannot be opened.
        UnreadableError: not a regular file, longer than `max_bytes`, of more than `MAX_LINES` lines,
            not UTF-8, or with a line of more than `BLOCK_BYTES` characters.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > max_bytes:
            raise UnreadableError(f"longer than {max_bytes:,} bytes")
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        n_lines = 0
        try:
            while line := text.readline(BLOCK_BYTES):
                if len(line) == BLOCK_BYTES:
                    raise UnreadableError(f"a line of more than {BLOCK_BYTES:,} characters")
                n_lines += 1
                if n_lines > MAX_LINES:
                    raise UnreadableError(f"more than {MAX_LINES:,} lines")
                yield line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise UnreadableError(f"not UTF-8 ({error.reason})") from None


def read_rows(path: str | Path, max_bytes: int) -> Iterator[list[str]]:
    """The rows of a CSV file in turn, with commas, or, where its first line has none, semicolons or tabs.

    The first line is the first that is not blank; a row of a blank line is empty.

    Raises:
        OSError: it does not exist or cannot be opened.
        UnreadableError: as `read_lines`, or not CSV: a field of more than 128 kB, a quote that is not
            closed, or text after a closing one.
    """
    lines = read_lines(path, max_bytes)
    head = ""
    n_blank = 0
    for head in lines:
        if head.strip():
            break
        n_blank += 1
        yield []
    comma = next((c for c in ";\t" if c in head and "," not in head), ",")
    # Cells in quotes hold line breaks. Not strict, a quote that is not closed takes in all that follows.
    whole = (f"{line}\n" for line in chain([head], lines))
    reader = csv.reader(whole, delimiter=comma, strict=True)
    n_read = 0
    try:
        for row in reader:
            yield row
            n_read = reader.line_num
    except csv.Error as error:
        problem = "a quote is not closed" if "end of data" in str(error) else error
        raise UnreadableError(f"not CSV: {problem}, in line {n_blank + n_read + 1}") from None


def read_json(path: str | Path, max_bytes: int = MAX_SETTINGS_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: it does not exist or cannot be opened.
        UnreadableError: not a regular file, too long, not JSON, nested more than `MAX_NESTING` deep,
            or with an integer of more than 64 bits.
    """
    return parse_json(read_text(path, max_bytes))


def read_json_object(path: str | Path, max_bytes: int = MAX_SETTINGS_BYTES) -> dict[str, Any]:
    """The same, where only an object has a meaning."""
    found = read_json(path, max_bytes)
    if not isinstance(found, dict):
        raise UnreadableError(f"a JSON {type(found).__name__} where an object belongs")
    return found


def parse_json(text: str, *, unique: bool = False) -> Any:
    """JSON text; raises `UnreadableError` as `read_json`, and, if `unique`, of an object with a key twice."""
    if text.count("[") + text.count("{") > MAX_CONTAINERS:
        raise UnreadableError(f"more than {MAX_CONTAINERS:,} lists and objects")
    if text.count(",") > MAX_VALUES:
        raise UnreadableError(f"more than {MAX_VALUES:,} values")
    try:
        return _bounded(json.loads(text, object_pairs_hook=_unique if unique else None))
    except RecursionError:
        raise UnreadableError(f"nested more than {MAX_NESTING} deep") from None
    except UnreadableError:
        raise
    except ValueError as error:
        raise UnreadableError(f"not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) is not value:
            raise UnreadableError(f"ambiguous: an object has the key {key!r} twice")
    return found


def stream_json(path: str | Path, max_bytes: int) -> Iterator[tuple[str, Any]]:
    """The values of the object in a JSON file, in turn, in memory for one of them at a time.

    A list comes as (its key, None), and then (its key, item) for each item.

    Raises:
        OSError: it does not exist or cannot be opened.
        UnreadableError: not a regular file, longer than `max_bytes`, not UTF-8, not a JSON object,
            with a value (an item of a list) of more than `MAX_SETTINGS_BYTES` characters, or of
            more than `MAX_STREAMED` such values, `MAX_STREAMED_CONTAINERS` lists and objects in
            them, or `MAX_STREAMED_COMMAS` commas.
    """
    with open_regular(path) as file:
        text = _Text(file, max_bytes)
        if text.peek() != "{":
            raise UnreadableError("not a JSON object")
        text.skip("{")
        while text.peek() != "}":
            key = text.value()
            if not isinstance(key, str):
                raise UnreadableError("not JSON: a key that is no text")
            text.skip(":")
            if text.peek() == "[":
                text.skip("[")
                yield key, None
                while text.peek() != "]":
                    yield key, text.value()
                    if text.peek() != "]":
                        text.skip(",")
                text.skip("]")
            else:
                yield key, text.value()
            if text.peek() != "}":
                text.skip(",")
        text.skip("}")
        if text.peek():
            raise UnreadableError("not JSON: text after its end")


class _Text:
    """The text of a JSON file, read in blocks."""

    def __init__(self, file: BinaryIO, max_bytes: int) -> None:
        self._file, self._max_bytes, self._left = file, max_bytes, max_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._buffer, self._at, self._ended = "", 0, False
        self._n_values = self._n_containers = self._n_commas = 0

    def peek(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            self._at = WHITE_SPACE.match(self._buffer, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._more()

    def skip(self, character: str) -> None:
        """Go beyond the next character, which has to be this one."""
        if (found := self.peek()) != character:
            raise UnreadableError(f"not JSON: {found!r} where {character!r} belongs")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self._n_values += 1
        if self._n_values > MAX_STREAMED:
            raise UnreadableError(f"more than {MAX_STREAMED:,} values")
        self.peek()
        while True:
            problem, found, end = "", None, 0
            try:
                found, end = DECODER.raw_decode(self._buffer, self._at)
            except RecursionError:
                raise UnreadableError("nested too deep") from None
            except ValueError as error:
                problem = f"not JSON: {error}"
            if not problem and (end + 2 < len(self._buffer) or self._ended):  # 1|e+|5
                self._at = end
                return found
            if self._ended:
                raise UnreadableError(problem)
            if len(self._buffer) - self._at > MAX_SETTINGS_BYTES:
                raise UnreadableError(
                    problem or f"a value of more than {MAX_SETTINGS_BYTES:,} characters"
                )
            self._more()

    def _more(self) -> None:
        block = self._file.read(max(BLOCK_BYTES, len(self._buffer) - self._at))
        self._left -= len(block)
        if self._left < 0:
            raise UnreadableError(f"longer than {self._max_bytes:,} bytes")
        self._ended = not block
        try:
            text = self._decoder.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise UnreadableError(f"not UTF-8 ({error.reason})") from None
        self._n_containers += text.count("[") + text.count("{")
        self._n_commas += text.count(",")
        if self._n_containers > MAX_STREAMED_CONTAINERS:
            raise UnreadableError(f"more than {MAX_STREAMED_CONTAINERS:,} lists and objects")
        if self._n_commas > MAX_STREAMED_COMMAS:
            raise UnreadableError(f"more than {MAX_STREAMED_COMMAS:,} commas")
        self._buffer, self._at = self._buffer[self._at :] + text, 0


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file.

    Raises:
        OSError: it does not exist or cannot be opened.
        UnreadableError: as `read_json`; also where aliases expand to more than `MAX_YAML_NODES`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what expands or nests beyond the bounds, before it is built."""

        sizes: dict[int, int] = {}  # id of a node -> its values, aliases expanded
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            is_alias = self.check_event(yaml.AliasEvent)
            self.depth += 1
            if self.depth > MAX_NESTING:
                raise UnreadableError(f"nested more than {MAX_NESTING} deep")
            node: Any = super().compose_node(parent, index)
            self.depth -= 1
            if isinstance(node, yaml.MappingNode) and not is_alias:
                keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
                if repeated := [key for key, n in Counter(keys).items() if n > 1]:
                    raise UnreadableError(f"the key {repeated[0]!r} stands twice")
            if not is_alias:
                inside = node.value if isinstance(node, yaml.CollectionNode) else []
                parts = [p for item in inside for p in (item if type(item) is tuple else [item])]
                self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in parts)
            if self.sizes.get(id(node), MAX_YAML_NODES) >= MAX_YAML_NODES:  # in itself, it has none
                raise UnreadableError(f"{MAX_YAML_NODES:,} values or more, aliases expanded")
            return node

    text = read_text(path, MAX_YAML_BYTES)
    try:
        return _bounded(yaml.load(text, Loader))  # a SafeLoader
    except UnreadableError:
        raise
    except RecursionError:
        raise UnreadableError(f"nested more than {MAX_NESTING} deep") from None
    except Exception as error:  # of a bad number or date PyYAML raises nearly anything
        raise UnreadableError(f"not YAML: {error or type(error).__name__}") from None


def _bounded(content: Any) -> Any:
    """`content`, after a check of its depth and of its integers."""
    level = [content]
    for _ in range(MAX_NESTING + 1):
        for value in level:
            if isinstance(value, int) and value.bit_length() > 64:
                raise UnreadableError("an integer of more than 64 bits")
        level = [
            item
            for value in level
            if isinstance(value, (dict, list))
            for item in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return content
    raise UnreadableError(f"nested more than {MAX_NESTING} deep")


def inside(folder: str | Path, name: str) -> Path:
    """The file that a file of ours calls `name`, which lies in `folder` also after links are followed.

    Raises:
        UnreadableError: it lies elsewhere, or `name` is no path.
    """
    top = Path(folder)
    try:
        path = top / name
        path.exists()  # raises where a name is too long
        found = path.resolve().is_relative_to(top.resolve())
    except (ValueError, OSError, RuntimeError) as error:  # NUL, a name too long, a loop of links
        raise UnreadableError(f"{name!r} is not a path ({error})") from None
    if not found:
        raise UnreadableError(f"{name!r} lies outside of {folder}")
    return path


def is_file_name(name: str) -> bool:
    """Whether a file or folder can have this name, in any folder."""
    fits = is_path(name) and len(os.fsencode(name)) <= 200
    return fits and name not in (".", "..") and not any(c in name for c in "/\\")


def is_path(text: object) -> bool:
    """Whether text can be the path of a file: not empty, no control characters, parts of 255 bytes."""
    if not isinstance(text, str) or not text:
        return False
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):  # control, lone surrogate
        return False
    return all(len(os.fsencode(part)) <= 255 for part in text.split("/"))


def check_regular(folder: str | Path) -> None:
    """Check the entries of a folder that a library reads.

    Raises:
        UnreadableError: one of them is a FIFO, a device or a socket.
    """
    for entry in sorted(Path(folder).iterdir()):
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise UnreadableError(f"{entry.name} is not a regular file")


def check_listable(folder: str | Path) -> None:
    """Raises DataError where the names in a folder cannot be read."""
    try:
        os.scandir(folder).close()
    except OSError as error:
        _not_listed(error)


def _not_listed(error: OSError) -> None:
    problem = f"it cannot be listed: {reason(error)}"
    allowed = "a folder that may be read, with all that are in it"
    raise DataError(f"folder {error.filename}", problem, allowed=allowed) from error


MAX_PLACES = 1000
"""Places below a folder at which one folder may appear, by links. Links among n folders can make 2**n."""


def walk_links(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` in sorted order that follows links, but none back up, and leaves hidden entries out.

    A folder that several links lead to, such as a class in two splits, is there at each of them.

    Raises:
        DataError: a folder cannot be listed, or is there at more than `MAX_PLACES` places.
    """
    above: dict[str, frozenset[str]] = {}  # folder -> the real folders that it is in, itself too
    places: Counter[str] = Counter()
    for folder, folders, names in os.walk(Path(root), followlinks=True, onerror=_not_listed):
        real = os.path.realpath(folder)
        within = above.get(os.path.dirname(folder), frozenset())
        if real in within:
            folders.clear()
            continue
        places[real] += 1
        if places[real] > MAX_PLACES:
            problem = f"links lead to it from more than {MAX_PLACES} places below {root}"
            raise DataError(f"folder {real}", problem, allowed="fewer links")
        above[folder] = within | {real}
        folders[:] = sorted(f for f in folders if f[0] != "." and f not in NO_CONTENTS)
        yield folder, folders, [name for name in names if name[0] != "."]


def write_atomically(path: str | Path, content: str | bytes, *, sync: bool = True) -> Path:
    """Write `content` (text as UTF-8) to `path` through a temporary file beside it.

    After a kill or with a full disk, `path` has either its old content or all of the new one.
    Without `sync` this holds after a kill but not after a power failure: for many small files that
    can be written again. Temporary files of `path` that an earlier, killed process of the same user
    has left are removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident():x}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        # A new file, so that the system applies the umask.
        with open(temporary, "xb") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a full disk is reported without a name
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise
    return path


def _remove_stale(path: Path) -> None:
    # The second form is mkstemp's, of earlier versions.
    ours = re.compile(rf"\.{re.escape(path.name)}\.(\d+-[0-9a-f]+\.tmp|(?=.*[\d_])[a-z\d_]{{8}})")
    for entry in os.scandir(path.parent):
        if not ours.fullmatch(entry.name):
            continue
        with suppress(OSError):
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISREG(found.st_mode) and is_stale(found):
                os.unlink(entry.path)


def is_stale(found: os.stat_result, seconds: float = STALE_SECONDS) -> bool:
    """Whether a file is our user's, and was last written that long ago."""
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return own and time.time() - found.st_mtime >= seconds


@contextmanager
def only_writer(folder: str | Path, field: str) -> Iterator[None]:
    """Keep other processes from writing into `folder`; the lock ends with the process.

    Without file locks (Windows, some network disks) nothing is kept out.

    Raises:
        ConfigError: another one is writing there; `field` is the setting that names the folder.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    place = Path(folder) / LOCK_FILENAME
    descriptor = os.open(place, flags, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(place)):
                raise BlockingIOError  # another one has removed the file, and locked a new one
        except (BlockingIOError, FileNotFoundError):
            problem, allowed = "another process is writing there", "another folder, or wait"
            raise ConfigError(field, problem, given=str(folder), allowed=allowed) from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            place.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def share(folder: Path) -> None:
    """Give the files in a new folder the permissions that the umask gave the folder.

    safetensors makes files that only their owner can read.
    """
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.parent.stat().st_mode & 0o666)


def file_digest(path: str | Path, *, sync: bool = False) -> str:
    """64 hex digits: the SHA-256 of a regular file, read a megabyte at a time.

    With `sync` its content is flushed to disk first.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
        if sync:
            os.fsync(file.fileno())
    return digest.hexdigest()
