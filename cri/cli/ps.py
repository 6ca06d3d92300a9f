"""`husk ps`: everything that Husk holds on this host, by owner; as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from sandbox.holdings import MARKED, Holding, State

COLUMNS = ("OWNER", "STATE", "KIND", "NAME", "AGE", "MEMORY", "CPU", "DETAIL")
_ID_WIDTH = 13


def as_json(holdings: Sequence[Holding]) -> str:
    """Return a JSON array with one object for each holding, in camelCase like the CRI's."""
    rows = [
        {
            "kind": each.kind,
            "name": each.name,
            "pod": each.pod,
            "container": each.container,
            "owner": each.owner,
            "state": each.state,
            "detail": each.detail,
            "ageSeconds": each.age_s,
            "memoryBytes": each.memory_bytes,
            "cpuSeconds": each.cpu_s,
        }
        for each in holdings
    ]
    return msgspec.json.format(msgspec.json.encode(rows), indent=2).decode()


def as_text(holdings: Sequence[Holding]) -> Iterator[str]:
    """Yield a table, then a line for each owner that is marked, with what to do. Ids of owners are cut."""
    rows = [COLUMNS, *map(_row, holdings)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    for row in rows:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        yield "  ".join([*cells, row[-1]]).rstrip()
    yield from _remedies(holdings)


def _row(each: Holding) -> tuple[str, ...]:
    owner = each.owner or each.pod[:_ID_WIDTH] or "-"
    if each.container:
        owner += f" {each.container[:_ID_WIDTH]}"
    mark = f"{each.state.upper()}!" if each.state in MARKED else str(each.state)
    return (
        owner,
        mark,
        each.kind,
        each.name,
        "" if each.age_s is None else age(each.age_s),
        "" if each.memory_bytes is None else f"{each.memory_bytes / (1 << 20):.1f} MiB",
        "" if each.cpu_s is None else f"{each.cpu_s:.1f} s",
        " ".join(each.detail.split()),
    )


def age(seconds: float) -> str:
    """Return a duration in its largest unit: 59s, 12m, 5h, 3d."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if whole >= size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def _remedies(holdings: Sequence[Holding]) -> Iterator[str]:
    pods = sorted({each.pod or each.container for each in holdings if each.state is State.QUARANTINED})
    for pod in pods:
        yield f"quarantined: {pod}: remove it with `crictl stopp {pod}` and `crictl rmp {pod}`"
    if orphans := sorted({each.pod for each in holdings if each.state is State.ORPHAN}):
        yield f"orphans of {len(orphans)} pods: the daemon releases them at its next start, or is doing so"
