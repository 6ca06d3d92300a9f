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
from collections.abc import Iterator
from typing import Final

BLOCK: Final = 512
EXTENSION_LIMIT: Final = 4 << 20  # bytes of one pax or GNU extension entry
EXTENSIONS_LIMIT: Final = 8 << 20  # bytes of all extension entries before one member, their headers included
COMMON_LIMIT: Final = 16 << 20  # bytes of all global pax entries of an archive, their headers included
RECORDS_LIMIT: Final = 10_000  # pax records in force at a time
PATH_LIMIT: Final = 4096  # PATH_MAX
SPARSE_LIMIT: Final = 1 << 20  # segments of one sparse file
NUMBER_LIMIT: Final = 1 << 62

REGULAR, HARD_LINK, SYMLINK, CHAR, BLOCK_DEVICE, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"
_DATA_KINDS = frozenset((b"0", b"\0", b"7", b"S"))
_ZERO = bytes(BLOCK)
# pax records that mean something here; others are not kept
_KEYS = frozenset(("path", "linkpath", "size", "uid", "gid", "mtime"))
_KEY_PREFIXES = ("SCHILY.xattr.", "GNU.sparse.")
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")

Xattrs = tuple[tuple[str, bytes], ...]
Segments = tuple[tuple[int, int], ...]


class TarError(Exception):
    """The archive is broken or exceeds a limit; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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

    def drain(self, limit: int) -> None:
        """Read to the stream's end: its digest covers the bytes after the archive's end too.

        Raises TarError above `limit` bytes.
        """
        count = len(self._chunk) - self._at
        while count <= limit:
            if not self._next():
                return
            count += len(self._chunk)
        raise TarError(f"more than {limit} bytes after the archive's end")

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


def entries(chunks: Chunks) -> Iterator[Entry]:
    """Yield the members in order, until two zero blocks or the end of the stream.

    Before the next one, the consumer must read exactly `stored` bytes and call `skip_padding`. Raises
    TarError.
    """
    common: dict[str, bytes] = {}
    common_bytes = 0
    while (header := _next_header(chunks)) is not None:
        local: dict[str, bytes] = {}
        sparse: list[tuple[int, int]] = []
        entry = _parse(header)
        extension_bytes = 0
        while entry.kind in b"xgLKXV":
            extension_bytes += BLOCK + entry.size
            if extension_bytes > EXTENSIONS_LIMIT:
                raise TarError(f"more than {EXTENSIONS_LIMIT} bytes of extension headers before one entry")
            if entry.kind == b"g":
                common_bytes += BLOCK + entry.size
                if common_bytes > COMMON_LIMIT:
                    raise TarError(f"more than {COMMON_LIMIT} bytes of global extension headers")
            _extension(chunks, entry, common, local, sparse)
            following = _next_header(chunks)
            if following is None:
                return
            entry = _parse(following)
            header = following
        if common or local:
            _apply(entry, {**common, **local} if common else local)
        _finish(chunks, header, entry, local, sparse)
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


def _extension(
    chunks: Chunks,
    entry: Entry,
    common: dict[str, bytes],
    local: dict[str, bytes],
    sparse: list[tuple[int, int]],
) -> None:
    """Read an extension entry, which describes later entries, into `common` (all later ones), `local` (the
    next one) and `sparse` (segments of the next one)."""
    if entry.size > EXTENSION_LIMIT:
        raise TarError(f"an extension header of {entry.size} bytes, the limit is {EXTENSION_LIMIT}")
    data = chunks.read(entry.size)
    skip_padding(chunks, entry.size)
    match entry.kind:
        case b"x" | b"X":
            _records(data, local, sparse)
        case b"g":
            _records(data, common, sparse)
        case b"L":
            local["path"] = data.partition(b"\0")[0]
        case b"K":
            local["linkpath"] = data.partition(b"\0")[0]
        case _:
            pass  # 'V': GNU's volume label


def _records(data: bytes, into: dict[str, bytes], sparse: list[tuple[int, int]]) -> None:
    """Parse records `LEN KEY=VALUE\\n`, where LEN counts itself; an empty value deletes the key (pax)."""
    at = 0
    offset = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        digits = data[at:space]
        if space < 0 or not digits.isdigit():
            raise TarError("broken pax header")
        end = at + int(digits)
        equals = data.find(b"=", space, end)
        if equals < 0 or end > len(data) or data[end - 1 : end] != b"\n":
            raise TarError("broken pax header")
        key = data[space + 1 : equals].decode("utf-8", "surrogateescape")
        value = data[equals + 1 : end - 1]
        # format 0.0 of sparse files repeats these two keys, once per segment
        if key == "GNU.sparse.offset":
            offset = _decimal(value)
        elif key == "GNU.sparse.numbytes":
            sparse.append((offset, _decimal(value)))
            if len(sparse) > SPARSE_LIMIT:
                raise TarError("too many segments in a sparse file")
        elif key in _KEYS or key.startswith(_KEY_PREFIXES):
            if value:
                into[key] = value
            else:
                into.pop(key, None)
            if len(into) > RECORDS_LIMIT:
                raise TarError(f"more than {RECORDS_LIMIT} pax records")
        at = end


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


def _finish(
    chunks: Chunks, header: bytes, entry: Entry, local: dict[str, bytes], sparse: list[tuple[int, int]]
) -> None:
    """Set what depends on headers and extensions together: kind, length of the data, sparse segments."""
    if entry.kind not in _DATA_KINDS:
        # links, devices and directories have no data, whatever their size field says (pax, "size")
        entry.size = entry.stored = 0
    elif entry.kind == b"S":
        _old_gnu_sparse(chunks, header, entry)
    elif sparse or "GNU.sparse.map" in local or "GNU.sparse.major" in local:
        _pax_sparse(chunks, entry, local, sparse)
    if entry.kind in (b"\0", b"7", b"S"):
        # before ustar, a directory was a file whose name ends in a slash
        entry.kind = DIRECTORY if entry.name.endswith(b"/") and not entry.stored else REGULAR
    if len(entry.name) > PATH_LIMIT or len(entry.link) > PATH_LIMIT:
        raise TarError(f"a name of more than {PATH_LIMIT} bytes")
    if entry.segments is not None:
        _check_segments(entry)


# ------------------------------------------------------------------------------------ sparse


def _old_gnu_sparse(chunks: Chunks, header: bytes, entry: Entry) -> None:
    """Read four segments at 386, more in extension blocks of 21, and the real size at 483 (GNU tar
    manual)."""
    segments: list[tuple[int, int]] = []
    _gnu_segments(header, 386, 4, segments)
    extended = header[482]
    while extended:
        block = chunks.read(BLOCK)
        _gnu_segments(block, 0, 21, segments)
        extended = block[504]
    entry.size = _number(header[483:495])
    entry.segments = tuple(segments)


def _gnu_segments(block: bytes, at: int, count: int, into: list[tuple[int, int]]) -> None:
    for begin in range(at, at + 24 * count, 24):
        if not block[begin]:
            return
        into.append((_number(block[begin : begin + 12]), _number(block[begin + 12 : begin + 24])))
        if len(into) > SPARSE_LIMIT:
            raise TarError("too many segments in a sparse file")


def _pax_sparse(chunks: Chunks, entry: Entry, local: dict[str, bytes], sparse: list[tuple[int, int]]) -> None:
    """Read the segments of GNU tar's formats 0.0 (repeated keys), 0.1 (one key) and 1.0 (a map before the
    data; GNU tar manual, "Storing Sparse Files")."""
    real = local.get("GNU.sparse.realsize") or local.get("GNU.sparse.size")
    if real is None:
        raise TarError("a sparse file without a size")
    if local.get("GNU.sparse.major") == b"1":
        sparse = _map_before_data(chunks, entry)
    elif "GNU.sparse.map" in local:
        numbers = [_decimal(n) for n in local["GNU.sparse.map"].split(b",")]
        sparse = list(zip(numbers[::2], numbers[1::2], strict=False))
    entry.size = _decimal(real)
    entry.segments = tuple(sparse)


def _map_before_data(chunks: Chunks, entry: Entry) -> list[tuple[int, int]]:
    """Read decimal lines: the count, then offset and length of each segment; padded to a block."""
    text = b""

    def line(rest: bytes) -> tuple[int, bytes]:
        while b"\n" not in rest:
            if entry.stored < BLOCK or len(rest) > BLOCK:
                raise TarError("broken map of a sparse file")
            rest += chunks.read(BLOCK)
            entry.stored -= BLOCK
        number, _, rest = rest.partition(b"\n")
        return _decimal(number), rest

    count, text = line(text)
    if count > SPARSE_LIMIT:
        raise TarError("too many segments in a sparse file")
    segments = []
    for _ in range(count):
        offset, text = line(text)
        length, text = line(text)
        segments.append((offset, length))
    return segments


def _check_segments(entry: Entry) -> None:
    """Raise TarError unless the segments are in order, apart, inside the file, and as long as the data."""
    end = total = 0
    for offset, length in entry.segments or ():
        if offset < end or length < 0:
            raise TarError("overlapping segments in a sparse file")
        end = offset + length
        total += length
    if end > entry.size or total != entry.stored:
        raise TarError("segments of a sparse file do not fit its size")
