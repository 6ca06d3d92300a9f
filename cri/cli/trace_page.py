"""The waterfall of a pod's start as a self-contained HTML page: no script, and nothing is fetched."""

from __future__ import annotations

from html import escape

from cri.cli.trace import Phase, Start, milliseconds, nice_end, ticks

STYLE = """
:root { color-scheme: light dark; --host: #3465a4; --guest: #c17d11; --line: #8886; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; font-weight: normal; padding: 0 .6rem 0 0; white-space: nowrap; }
td:nth-child(2) { width: 100%; padding: 0; } td:last-child { text-align: right; padding-left: .6rem; }
.track { position: relative; height: 1.5rem; border-left: 1px solid var(--line); }
.track i { position: absolute; top: .25rem; bottom: .25rem; min-width: 2px; border-radius: 2px; }
.host { background: var(--host); } .guest { background: var(--guest); }
.ruler { position: relative; height: 1.5rem; } .ruler span { position: absolute; opacity: .7; }
.key i { display: inline-block; width: 1em; height: .8em; margin: 0 .3em 0 1em; }
"""


def as_html(start: Start) -> str:
    """Return the page. Every text of the pod is escaped."""
    scale_s = nice_end(start.end_seconds)
    title = escape(start.title)
    marks = "".join(
        f'<span style="left:{100 * place:.2f}%">{escape(label)}</span>'
        for place, label in ticks(scale_s)[:-1]
    )
    rows = "\n".join(_row(phase, scale_s) for phase in start.phases)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="key"><i class="host"></i>host<i class="guest"></i>guest</p>
<table>
<tr><td></td><td><div class="ruler">{marks}</div></td><td></td></tr>
{rows}
</table></body></html>
"""


def _row(phase: Phase, scale_s: float) -> str:
    left = 100 * max(phase.begin_seconds, 0.0) / scale_s
    width = 100 * max(phase.end_seconds - max(phase.begin_seconds, 0.0), 0.0) / scale_s
    side = "guest" if phase.side == "guest" else "host"
    when = escape(f"{1000 * phase.begin_seconds:.1f} to {1000 * phase.end_seconds:.1f} ms, {side}")
    return (
        f'<tr title="{when}"><th scope="row">{escape(phase.name)}</th><td><div class="track">'
        f'<i class="{side}" style="left:{left:.3f}%;width:{width:.3f}%"></i></div></td>'
        f"<td>{milliseconds(phase)}</td></tr>"
    )
