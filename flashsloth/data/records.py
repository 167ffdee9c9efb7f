"""Where records come from: LLaVA's JSON with images in a folder or in tar shards, or webdataset shards with both.

Every source is read by index, in any order. A tar shard is not unpacked: its headers are read once, and a member is
then one seek and one read, so a run resumes anywhere and ranks and workers share records without reading each other's.
That is why this is :mod:`tarfile` and not the package webdataset, which streams: it deals whole shards to workers, so
an epoch is not each record once, and it resumes only by reading again what was read.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from flashsloth.data.broken import BrokenRecord

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")


class RecordSource(Protocol):
    """Records by index.

    Attributes:
        sizes: int64 ``(records,)``, bytes of each record's text: what tells long from short without reading it.
        shards: int64, ascending from 0: where each run of records begins that is read fastest in order.
    """

    sizes: np.ndarray
    shards: np.ndarray

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What reports call a record: ``train.json[17]``, ``0003.tar:000017``."""

    def record(self, index: int) -> Any:
        """The JSON value. Raises BrokenRecord."""

    def picture(self, index: int, record: dict[str, Any]) -> bytes | None:
        """The encoded image of a record, None where it has none. Raises BrokenRecord."""


class Pictures(Protocol):
    """Encoded images by name."""

    def read(self, name: str) -> bytes:
        """Raises BrokenRecord."""


class Texts:
    """Byte strings in one array: a list of objects would be copied into every worker, reference by reference."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        parts = list(texts)
        self.sizes = np.array([len(part) for part in parts], dtype=np.int64)
        self._ends = self.sizes.cumsum()
        self._data = np.frombuffer(b"".join(parts), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> bytes:
        end = int(self._ends[index])
        return self._data[end - int(self.sizes[index]) : end].tobytes()


class JsonRecords:
    """``.json`` (a list) and ``.jsonl`` (an object a line) files of LLaVA's format.

    Args:
        files: one path or several, read one after the other.
        pictures: where a record's ``image`` is looked up; by default beside its file.

    Raises:
        FileNotFoundError: no such file; ValueError: a file that is no list of records, or none of them has any.
    """

    def __init__(self, files: str | os.PathLike[str] | Sequence[Any], pictures: Pictures | None = None) -> None:
        self._files = _paths("files", files)
        texts = [list(_read_json_file(path)) for path in self._files]
        self._texts = Texts(text for file in texts for text in file)
        if not len(self._texts):
            raise ValueError(f"files: expected at least one record, got none in {', '.join(map(str, self._files))}")
        self._starts = np.cumsum([0] + [len(file) for file in texts])
        self._pictures = [pictures or FolderPictures(path.parent) for path in self._files]
        self.sizes = self._texts.sizes
        self.shards = np.arange(len(self._texts))  # a file of its own each: the images are

    def __len__(self) -> int:
        return len(self._texts)

    def name(self, index: int) -> str:
        file = self._file(index)
        return f"{self._files[file].name}[{index - self._starts[file]}]"

    def record(self, index: int) -> Any:
        return parse(self._texts[index])

    def picture(self, index: int, record: dict[str, Any]) -> bytes | None:
        name = image_name(record)
        return None if name is None else self._pictures[self._file(index)].read(name)

    def _file(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


class FolderPictures:
    """Images in a folder, named by their paths in it."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise NotADirectoryError(f"images: expected a folder, got {self.folder}")

    def read(self, name: str) -> bytes:
        path = os.path.normpath(name)
        if "\0" in name or os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
            raise BrokenRecord("image_path", f"expected a path within {self.folder}, got {name!r}")
        try:
            return (self.folder / path).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise BrokenRecord("missing_image", f"{name} is not in {self.folder}") from None
        except UnicodeEncodeError as error:
            raise BrokenRecord("image_path", f"{name!r}: {error}") from error
        except OSError as error:
            raise BrokenRecord("unreadable_image", f"{name}: {error.strerror or error}") from error


class Member(NamedTuple):
    """A file in a tar shard: ``size`` bytes at ``offset``."""

    name: str
    offset: int
    size: int


class TarPictures:
    """Images in tar shards, named as their members."""

    def __init__(self, shards: str | os.PathLike[str] | Sequence[Any]) -> None:
        self._shards = _paths("shards", shards)
        self._places: dict[str, tuple[int, int, int]] = {}
        for number, path in enumerate(self._shards):
            members, _ = read_shard(path)  # an image lost at a damaged end is a missing image of its record
            for member in members:
                self._places[os.path.normpath(member.name)] = (number, member.offset, member.size)

    def read(self, name: str) -> bytes:
        place = self._places.get(os.path.normpath(name))
        if place is None:
            raise BrokenRecord("missing_image", f"{name} is in none of {len(self._shards)} tar shards")
        return _read_member(self._shards[place[0]], *place[1:])


class TarRecords:
    """webdataset shards: members of one sample follow each other and share a name up to the first dot of the file.

    ``0017.json`` holds the record and ``0017.jpg`` (or another of :data:`PICTURES`) its image, whatever ``image`` in
    the record says.

    Args:
        shards: uncompressed tar files, in order.

    Raises:
        FileNotFoundError: no such file; ValueError: a file that is no tar or is compressed, or no sample in any.
    """

    def __init__(self, shards: str | os.PathLike[str] | Sequence[Any]) -> None:
        self._shards = _paths("shards", shards)
        rows: list[tuple[int, int, int, int, int]] = []
        names: list[bytes] = []
        starts: list[int] = []
        self._damage: dict[int, str] = {}
        for number, path in enumerate(self._shards):
            members, damage = read_shard(path)
            starts.append(len(rows))
            for key, text, picture in _samples(members):
                names.append(f"{path.name}:{key}".encode(errors="surrogateescape"))
                rows.append((number, *_place(text), *_place(picture)))
            if damage is not None:
                self._damage[len(rows)] = damage
                names.append(f"{path.name}:(end)".encode())
                rows.append((number, *_place(None), *_place(None)))
        if len(rows) == len(self._damage):
            raise ValueError(f"shards: expected samples, got none in {', '.join(map(str, self._shards))}")
        self._places = np.array(rows, dtype=np.int64)
        self._names = Texts(names)
        self.sizes = np.maximum(self._places[:, 2], 0)
        self.shards = np.unique(np.array(starts, dtype=np.int64))
        self.shards = self.shards[self.shards < len(rows)]

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        return self._names[index].decode(errors="backslashreplace")

    def record(self, index: int) -> Any:
        if index in self._damage:
            raise BrokenRecord("damaged_shard", self._damage[index])
        shard, offset, size, _, _ = self._places[index].tolist()
        if size < 0:
            raise BrokenRecord("malformed_record", "a sample without a .json member")
        return parse(_read_member(self._shards[shard], offset, size))

    def picture(self, index: int, record: dict[str, Any]) -> bytes | None:
        shard, _, _, offset, size = self._places[index].tolist()
        if size >= 0:
            return _read_member(self._shards[shard], offset, size)
        if (name := image_name(record)) is not None:
            raise BrokenRecord("missing_image", f"the record names {name}, but its sample has no image member")
        return None


class JoinedRecords:
    """Several sources as one, end to end."""

    def __init__(self, sources: Sequence[RecordSource]) -> None:
        if not sources:
            raise ValueError("sources: expected at least one, got none")
        self._sources = list(sources)
        self._starts = np.cumsum([0] + [len(source) for source in sources])
        self.sizes = np.concatenate([source.sizes for source in sources])
        self.shards = np.concatenate(
            [source.shards + start for source, start in zip(sources, self._starts[:-1], strict=True)]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def name(self, index: int) -> str:
        source, inner = self._find(index)
        return source.name(inner)

    def record(self, index: int) -> Any:
        source, inner = self._find(index)
        return source.record(inner)

    def picture(self, index: int, record: dict[str, Any]) -> bytes | None:
        source, inner = self._find(index)
        return source.picture(inner, record)

    def _find(self, index: int) -> tuple[RecordSource, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._sources[number], index - int(self._starts[number])


def open_records(data: Any, images: Any = None) -> RecordSource:
    """The records of ``data``: paths of ``.json``, ``.jsonl`` or ``.tar`` files, or one of them.

    Args:
        images: a folder or ``.tar`` shards in which records of JSON files find their images; by default the folder of
            each file. Tar records bring their own.

    Raises:
        ValueError, FileNotFoundError: a name of another kind, or what the sources raise.
    """
    paths = _paths("data", data)
    for path in paths:
        if path.suffix not in (".json", ".jsonl", ".tar"):
            raise ValueError(f"data: expected .json, .jsonl or .tar files, got {path}")
    texts, shards = [p for p in paths if p.suffix != ".tar"], [p for p in paths if p.suffix == ".tar"]
    sources: list[RecordSource] = []
    if texts:
        sources.append(JsonRecords(texts, None if images is None else _pictures(images)))
    if shards:
        sources.append(TarRecords(shards))
    return sources[0] if len(sources) == 1 else JoinedRecords(sources)


def image_name(record: dict[str, Any]) -> str | None:
    """The name in a record's ``image``; None where there is no image. Raises BrokenRecord."""
    name = record.get("image")
    if isinstance(name, list):
        if len(name) > 1:
            raise BrokenRecord("several_images", f"expected at most one image, got {len(name)}")
        name = name[0] if name else None
    if name is None:
        return None
    if not isinstance(name, str) or not name:
        raise BrokenRecord("image_path", f"image: expected the name of a file, got {name!r:.80}")
    return name


def parse(text: bytes) -> Any:
    """A JSON value. Raises BrokenRecord."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenRecord("malformed_json", str(error)) from error


def read_shard(path: Path) -> tuple[list[Member], str | None]:
    """The regular files in a tar, in order, and what is wrong with its end, None for nothing.

    Raises:
        ValueError: it is no tar, or compressed; OSError: it cannot be opened.
    """
    length = path.stat().st_size
    members: list[Member] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for entry in tar:
                if not entry.isreg() or entry.issparse():
                    continue
                if entry.offset_data + entry.size > length:
                    return members, f"{path.name} ends within {entry.name}"
                members.append(Member(entry.name, entry.offset_data, entry.size))
            end = tar.offset
    except tarfile.TarError as error:
        if not members:
            raise ValueError(f"{path}: expected an uncompressed tar file: {error}") from error
        return members, f"{path.name} is damaged behind {members[-1].name}: {error}"
    with path.open("rb") as file:  # tarfile takes a header that it cannot read, but for the first, for the end
        file.seek(end)
        if any(file.read(tarfile.BLOCKSIZE)):
            return members, f"{path.name}: expected the end or a header at byte {end}, got neither"
    return members, None


def _samples(members: Sequence[Member]) -> Iterator[tuple[str, Member | None, Member | None]]:
    """(key, record, image) of each run of members that share a key and have either."""
    key, text, picture = "", None, None
    for member in members:
        folder, _, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if this != key:
            if text or picture:
                yield key, text, picture
            key, text, picture = this, None, None
        extension = extension.lower()
        if extension == "json":
            text = member
        elif extension in PICTURES:
            picture = member
    if text or picture:
        yield key, text, picture


def _place(member: Member | None) -> tuple[int, int]:
    return (-1, -1) if member is None else (member.offset, member.size)


def _read_member(path: Path, offset: int, size: int) -> bytes:
    # Opened for each member: nothing is shared between processes, and it takes microseconds beside decoding.
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
    except OSError as error:
        raise BrokenRecord("damaged_shard", f"{path.name}: {error.strerror or error}") from error
    if len(data) < size:
        raise BrokenRecord("damaged_shard", f"{path.name}: expected {size} bytes at {offset}, got {len(data)}")
    return data


def _read_json_file(path: Path) -> Iterator[bytes]:
    if path.suffix == ".jsonl":
        with path.open("rb") as lines:
            yield from (line for line in map(bytes.strip, lines) if line)
        return
    with path.open("rb") as file:
        try:
            records = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected a JSON list of records: {error}") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a JSON list of records, got {type(records).__name__}")
    for record in records:
        # Not escaped, so that the size says how long the text is; half a surrogate pair stays what it is.
        yield json.dumps(record, ensure_ascii=False).encode(errors="surrogatepass")


def _pictures(images: Any) -> Pictures:
    paths = _paths("images", images)
    if len(paths) == 1 and paths[0].is_dir():
        return FolderPictures(paths[0])
    return TarPictures(paths)


def _paths(name: str, value: Any) -> list[Path]:
    """One path or several, that are there."""
    values = [value] if isinstance(value, (str, os.PathLike)) else list(value)
    if not values:
        raise ValueError(f"{name}: expected at least one path, got none")
    paths = [Path(one) for one in values]
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{name}: expected a path that exists, got {path}")
    return paths
