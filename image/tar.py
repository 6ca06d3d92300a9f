"""Read tar archives as a stream: ustar, pax, GNU long names, sparse files, base-256 numbers. Pure.

The archive is untrusted: every length is bounded before anything is read or allocated, and names stay bytes.
`layer` decides what an entry may do. The standard library's `tarfile` reads the same formats at four times
the cost per entry, which for an image of 20,000 files is more than all the writing (see tests/bench).

    block    512 bytes: a header, or data padded to a multiple of it
    pax      entries 'x' (for the next header) and 'g' (for all that follow): "LEN KEY=VALUE\\n" records
    GNU      entries 'L', 'K': the next header's name, link name

Formats: POSIX.1-2001 pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar manual, "Basic Tar
Format" and "Storing Sparse Files".
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from typing import Final

from image.budget import Budget, Limits

BLOCK: Final = 512
PATH_LIMIT: Final = 4096  # PATH_MAX
NUMBER_LIMIT: Final = 1 << 62

REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_DATA_KINDS = frozenset((b"0", b"\0", b"7", b"S"))
_ZERO = bytes(BLOCK)
# pax records that mean something here; others are not kept
_KEYS = frozenset(("path", "linkpath", "size", "uid", "gid", "mtime"))
_KEY_PREFIXES = ("SCHILY.xattr.", "GNU.sparse.")
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")

Xattrs = tuple[tuple[str, bytes], ...]


class TarError(Exception):
    """The archive is broken or exceeds a limit; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Segments:
    """The segments of a sparse file that hold data, in order and apart: offset and length each.

    Empty ones are checked and counted, and not kept. Sixteen bytes each, as there may be very many.
    """

    __slots__ = ("_budget", "_lengths", "_offsets", "end", "total")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._offsets = array("q")
        self._lengths = array("q")
        self.end = 0
        self.total = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._offsets, self._lengths, strict=True)

    def append(self, offset: int, length: int) -> None:
        """Add one behind the others. Raises TarError, OverLimit."""
        self._budget.spend()
        if offset < self.end or length < 0:
            raise TarError("overlapping segments in a sparse file")
        self.end = offset + length
        self.total += length
        if self.end > NUMBER_LIMIT:
            raise TarError("a segment of a sparse file that ends beyond any file")
        if length:
            self._offsets.append(offset)
            self._lengths.append(length)


class Chunks:
    """Exact reads over a stream that arrives in chunks of any size.

    `read`, `pieces` and `skip` raise TarError when the stream ends before what they should return.
    """

    __slots__ = ("_at", "_chunk", "_source")

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self._chunk = b""
        self._at = 0

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        at = self._at
        end = at + size
        if end <= len(self._chunk):
            self._at = end
            return self._chunk[at:end]
        return b"".join(self.pieces(size))

    def pieces(self, size: int) -> Iterator[memoryview]:
        """Yield the next `size` bytes as views of the chunks, without copying them."""
        while size:
            if self._at == len(self._chunk) and not self._next():
                raise TarError("the archive ends in the middle of an entry")
            piece = memoryview(self._chunk)[self._at : self._at + size]
            self._at += len(piece)
            size -= len(piece)
            yield piece

    def skip(self, size: int) -> None:
        """Read `size` bytes and drop them."""
        for _ in self.pieces(size):
            pass

    def at_end(self) -> bool:
        """Return whether no byte is left."""
        return self._at == len(self._chunk) and not self._next()

    def drain(self, budget: Budget) -> None:
        """Read to the stream's end, as its digest covers the bytes after the archive's end too.

        Raises OverLimit.
        """
        budget.spend(len(self._chunk) - self._at)
        while self._next():
            budget.spend(len(self._chunk))

    def _next(self) -> bool:
        for chunk in self._source:
            if chunk:
                self._chunk, self._at = chunk, 0
                return True
        self._chunk, self._at = b"", 0
        return False


class Entry:
    """One member of the archive. `stored` bytes of data follow it in the stream; `size` is the file's length,
    which is greater for a sparse file."""

    __slots__ = (
        "gid", "kind", "link", "major", "minor", "mode", "mtime_ns", "name", "segments", "size", "stored",
        "uid", "xattrs",
    )  # fmt: skip

    name: bytes
    link: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    stored: int
    mtime_ns: int
    major: int
    minor: int
    xattrs: Xattrs
    segments: Segments | None  # (offset, length) of the data of a sparse file


class _Headers:
    """What precedes a member: pax and GNU extension entries, with their budgets."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._one = Budget(limits, "extension_bytes")
        self._global = Budget(limits, "global_bytes")
        self._records = Budget(limits, "pax_records")
        self._segments = Budget(limits, "layer_segments")
        self.common: dict[str, bytes] = {}  # of all members that follow
        self.begin()

    def begin(self) -> None:
        """Begin the next member."""
        self.local: dict[str, bytes] = {}
        self.sparse = Segments(self._segments)  # of pax format 0.0
        self._all = Budget(self._limits, "extensions_bytes")
        self._offset = 0

    def new_segments(self) -> Segments:
        """Return empty segments, which count for the archive's limit."""
        return Segments(self._segments)

    def read(self, chunks: Chunks, entry: Entry) -> None:
        """Read an extension entry. Raises TarError, OverLimit."""
        self._one.check(entry.size)
        self._all.spend(BLOCK + entry.size)
        if entry.kind == b"g":
            self._global.spend(BLOCK + entry.size)
        data = chunks.read(entry.size)
        skip_padding(chunks, entry.size)
        match entry.kind:
            case b"x" | b"X":
                self._parse(data, self.local)
            case b"g":
                self._parse(data, self.common)
            case b"L":
                self.local["path"] = data.partition(b"\0")[0]
            case b"K":
                self.local["linkpath"] = data.partition(b"\0")[0]
            case _:
                pass  # 'V': GNU's volume label

    def _parse(self, data: bytes, into: dict[str, bytes]) -> None:
        """Parse records `LEN KEY=VALUE\\n`, where LEN counts itself; an empty value deletes the key (pax)."""
        at = 0
        while at < len(data):
            space = data.find(b" ", at, at + 20)
            digits = data[at:space]
            if space < 0 or not digits.isdigit():
                raise TarError("broken pax header")
            end = at + int(digits)
            equals = data.find(b"=", space, end)
            if equals < 0 or end > len(data) or data[end - 1 : end] != b"\n":
                raise TarError("broken pax header")
            self._record(data[space + 1 : equals], data[equals + 1 : end - 1], into)
            at = end

    def _record(self, name: bytes, value: bytes, into: dict[str, bytes]) -> None:
        key = name.decode("utf-8", "surrogateescape")
        # format 0.0 of sparse files repeats these two keys, once per segment
        if key == "GNU.sparse.offset":
            self._offset = _decimal(value)
        elif key == "GNU.sparse.numbytes":
            self.sparse.append(self._offset, _decimal(value))
        elif key in _KEYS or key.startswith(_KEY_PREFIXES):
            if value:
                into[key] = value
            else:
                into.pop(key, None)
            self._records.check(len(into))


def entries(chunks: Chunks, limits: Limits) -> Iterator[Entry]:
    """Yield the members in order, until two zero blocks or the end of the stream.

    Before the next one, the consumer must read exactly `stored` bytes and call `skip_padding`. Raises
    TarError, OverLimit.
    """
    headers = _Headers(limits)
    while (header := _next_header(chunks)) is not None:
        entry = _parse(header)
        headers.begin()
        while entry.kind in b"xgLKXV":
            headers.read(chunks, entry)
            following = _next_header(chunks)
            if following is None:
                return
            entry = _parse(following)
            header = following
        common, local = headers.common, headers.local
        if common or local:
            _apply(entry, {**common, **local} if common else local)
        _finish(chunks, header, entry, headers)
        yield entry


def skip_padding(chunks: Chunks, stored: int) -> None:
    """Skip what pads `stored` bytes of data to whole blocks."""
    if padding := -stored % BLOCK:
        chunks.read(padding)


def _next_header(chunks: Chunks) -> bytes | None:
    if chunks.at_end():
        return None  # some writers omit the two zero blocks
    header = chunks.read(BLOCK)
    return None if header == _ZERO else header


def _parse(header: bytes) -> Entry:
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, _, major, minor, prefix, rest) = (
        _HEADER.unpack(header)
    )
    if sum(header) - sum(checksum) + 256 != _number(checksum):
        _check_signed(header, checksum)
    entry = Entry()
    entry.name = name.partition(b"\0")[0]
    if magic == b"ustar\x0000" and prefix[0]:
        if rest[8:] == b"tar\0":  # star stores atime and ctime after 131 bytes of prefix
            prefix = prefix[:131]
        if directory := prefix.partition(b"\0")[0]:
            entry.name = directory + b"/" + entry.name
    entry.link = link.partition(b"\0")[0] if link[0] else b""
    entry.kind = kind
    entry.mode = _number(mode) & 0o7777
    entry.uid, entry.gid = _number(uid), _number(gid)
    entry.size = entry.stored = _number(size)
    entry.mtime_ns = _number(mtime) * 1_000_000_000
    entry.major = entry.minor = 0
    if kind in b"34":
        entry.major, entry.minor = _number(major), _number(minor)
    entry.xattrs = ()
    entry.segments = None
    if entry.size < 0 or entry.size > NUMBER_LIMIT:
        raise TarError(f"impossible size {entry.size}")
    return entry


def _number(field: bytes) -> int:
    """Parse octal text, or base 256 in two's complement if the first bit is set (GNU)."""
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    text = field.partition(b"\0")[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError as error:
        raise TarError("a header holds a number that is not octal") from error


def _check_signed(header: bytes, checksum: bytes) -> None:
    """Accept a checksum over signed bytes, which old writers computed (GNU tar manual, "Basic Tar
    Format")."""
    signed = sum(b - 256 if b > 127 else b for b in header[:148] + header[156:]) + 8 * 32
    if signed != _number(checksum):
        raise TarError("not a tar header (its checksum is wrong)")


# -------------------------------------------------------------------------------- extensions


def _apply(entry: Entry, records: dict[str, bytes]) -> None:
    """Override the header's fields with those of pax records and GNU long names."""
    xattrs: list[tuple[str, bytes]] = []
    for key, value in records.items():
        match key:
            case "path" | "GNU.sparse.name":
                continue
            case "linkpath":
                entry.link = value
            case "size":
                entry.size = entry.stored = _decimal(value)
            case "uid":
                entry.uid = _decimal(value)
            case "gid":
                entry.gid = _decimal(value)
            case "mtime":
                entry.mtime_ns = _time(value)
            case _ if key.startswith("SCHILY.xattr."):
                if "\0" in key:
                    raise TarError("the name of an extended attribute has a null byte")
                xattrs.append((key.removeprefix("SCHILY.xattr."), value))
    # the "path" of a sparse file is a placeholder for readers that do not know the format
    if (name := records.get("GNU.sparse.name") or records.get("path")) is not None:
        entry.name = name
    entry.xattrs = tuple(xattrs)


def _decimal(value: bytes) -> int:
    if not value.isdigit() or len(value) > 19:
        raise TarError("a pax header holds an invalid number")
    return int(value)


def _time(value: bytes) -> int:
    """Return decimal seconds, possibly negative and with a fraction of any length, in nanoseconds."""
    whole, _, fraction = value.removeprefix(b"-").partition(b".")
    if not whole.isdigit() or len(whole) > 18 or (fraction and not fraction.isdigit()):
        raise TarError("a pax header holds an invalid time")
    time_ns = int(whole) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0") or b"0")
    return -time_ns if value.startswith(b"-") else time_ns


def _finish(chunks: Chunks, header: bytes, entry: Entry, headers: _Headers) -> None:
    """Set what depends on headers and extensions together: kind, length of the data, sparse segments."""
    if entry.kind not in _DATA_KINDS:
        # links, devices and directories have no data, whatever their size field says (pax, "size")
        entry.size = entry.stored = 0
    elif entry.kind == b"S":
        _old_gnu_sparse(chunks, header, entry, headers.new_segments())
    elif any(key.startswith("GNU.sparse.") for key in headers.local):
        _pax_sparse(chunks, entry, headers)
    if entry.kind in (b"\0", b"7", b"S"):
        # before ustar, a directory was a file whose name ends in a slash
        entry.kind = DIRECTORY if entry.name.endswith(b"/") and not entry.stored else REGULAR
    if len(entry.name) > PATH_LIMIT or len(entry.link) > PATH_LIMIT:
        raise TarError(f"a name of more than {PATH_LIMIT} bytes")
    segments = entry.segments
    if segments is not None and (segments.end > entry.size or segments.total != entry.stored):
        raise TarError("segments of a sparse file do not fit its size")


# ------------------------------------------------------------------------------------ sparse


def _old_gnu_sparse(chunks: Chunks, header: bytes, entry: Entry, segments: Segments) -> None:
    """Read four segments at 386, more in extension blocks of 21, and the real size at 483 (GNU tar
    manual)."""
    _gnu_segments(header, 386, 4, segments)
    extended = header[482]
    while extended:
        block = chunks.read(BLOCK)
        _gnu_segments(block, 0, 21, segments)
        extended = block[504]
    entry.size = _number(header[483:495])
    entry.segments = segments


def _gnu_segments(block: bytes, at: int, count: int, into: Segments) -> None:
    for begin in range(at, at + 24 * count, 24):
        if not block[begin]:
            return
        into.append(_number(block[begin : begin + 12]), _number(block[begin + 12 : begin + 24]))


def _pax_sparse(chunks: Chunks, entry: Entry, headers: _Headers) -> None:
    """Read the segments of GNU tar's formats 0.0 (repeated keys), 0.1 (one key) and 1.0 (a map before the
    data; GNU tar manual, "Storing Sparse Files")."""
    local = headers.local
    real = local.get("GNU.sparse.realsize") or local.get("GNU.sparse.size")
    if real is None:
        raise TarError("a sparse file without a size")
    segments = headers.sparse
    if local.get("GNU.sparse.major") == b"1":
        segments = headers.new_segments()
        _map_before_data(chunks, entry, segments)
    elif "GNU.sparse.map" in local:
        segments = headers.new_segments()
        _map_in_header(local["GNU.sparse.map"], segments)
    entry.size = _decimal(real)
    entry.segments = segments


def _map_in_header(text: bytes, into: Segments) -> None:
    """Read `OFFSET,LENGTH,...` piece by piece: split at once, a map of a megabyte would take a hundred."""
    at = 0
    offset: int | None = None
    while at <= len(text):
        end = text.find(b",", at)
        end = len(text) if end < 0 else end
        number = _decimal(text[at:end])
        if offset is None:
            offset = number
        else:
            into.append(offset, number)
            offset = None
        at = end + 1


def _map_before_data(chunks: Chunks, entry: Entry, into: Segments) -> None:
    """Read decimal lines: the count, then offset and length of each segment; padded to a block."""
    text, at = b"", 0

    def line() -> int:
        nonlocal text, at
        while (end := text.find(b"\n", at)) < 0:
            if entry.stored < BLOCK or len(text) - at > BLOCK:
                raise TarError("broken map of a sparse file")
            text, at = text[at:] + chunks.read(BLOCK), 0
            entry.stored -= BLOCK
        number, at = _decimal(text[at:end]), end + 1
        return number

    for _ in range(line()):
        offset = line()
        into.append(offset, line())
