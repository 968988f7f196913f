"""The frame of the report: style and nothing that is loaded from elsewhere."""

from __future__ import annotations

from html import escape

STYLE = """
:root { color-scheme: light dark;
  --paper: #fbfaf7; --card: #fff; --ink: #1d1f24; --quiet: #6b6f78; --line: #e4e1d9;
  --accent: #2f6f8f; --right: #1f7a45; --wrong: #b3362b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #15171b; --card: #1d2026; --ink: #e8e6e1; --quiet: #989ca6; --line: #30343c;
  --accent: #7fc1de; --right: #6fce95; --wrong: #f0867b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 20px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 52px 0 8px; }
p { max-width: 68ch; margin: 8px 0; }
.quiet, figcaption { color: var(--quiet); font-size: 14px; }
.notice { border-left: 4px solid var(--accent); padding: 8px 16px; background: var(--card); }
.score { display: flex; gap: 24px; align-items: center; margin: 20px 0;
  padding: 16px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.score b { font-size: 52px; line-height: 1; font-variant-numeric: tabular-nums; }
.score small { font-size: 26px; color: var(--quiet); font-weight: 500; }
.score p b { font-size: inherit; }
.pass > b { color: var(--right); } .fail > b, .fail p b { color: var(--wrong); }
figure { margin: 0; min-width: 0; }
.grid { display: grid; gap: 18px; margin-top: 16px;
  grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.grid.double { grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); }
video { width: 100%; display: block; border-radius: 8px; background: var(--line); }
.grid figcaption { margin-top: 6px; line-height: 1.35; }
.chip { display: inline-flex; align-items: center; gap: 6px; margin-left: 6px; font-weight: 600;
  white-space: nowrap; }
.chip i { width: 11px; height: 11px; border-radius: 50%; }
.right { color: var(--right); } .wrong { color: var(--wrong); }
.pair { display: grid; gap: 28px; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); }
.wide { background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  padding: 14px 18px; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--quiet); font-size: 12px; } .mid { text-anchor: middle; }
.end { text-anchor: end; } .grid line, line.grid { stroke: var(--line); }
polyline { fill: none; stroke: var(--accent); } .thin { opacity: 0.35; }
.curve { stroke-width: 2.5; stroke-linejoin: round; }
.strip { display: grid; gap: 14px; margin: 16px 0;
  grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); }
.strip img { width: 100%; border-radius: 6px; display: block; }
.strip figcaption { font-size: 12px; line-height: 1.3; margin-top: 4px; overflow-wrap: anywhere; }
.bars { display: grid; gap: 28px; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
caption { text-align: left; font-weight: 600; padding-bottom: 4px; }
td, th { padding: 3px 8px 3px 0; vertical-align: middle; text-align: left; }
.bars td:nth-child(2) { width: 60%; }
.facts td, .facts th { border-bottom: 1px solid var(--line); padding: 6px 8px 6px 0; }
.bar { height: 10px; border-radius: 5px; background: var(--accent); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  overflow-x: auto; font-size: 14px; }
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
"""Lets the browser itself see to it that the page loads nothing."""


def page(title: str, body: str) -> str:
    """A whole HTML document; `body` is HTML already."""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
