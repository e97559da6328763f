"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from vllm_graft.doctor.compare import LIMIT, Divergence
from vllm_graft.doctor.report import Report

_STYLE = """body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #ccc}
.bad{color:#b00020;font-weight:bold}svg{max-width:100%}"""
_SMALLEST, _LARGEST = -8, 1
"""Powers of ten at the bottom and the top of the plot."""
_BAR, _HEIGHT, _LEFT = 14, 180, 40


def page(report: Report, title: str) -> str:
    """A self-contained page: verdict, paths, plot by layer, gradients, diagnoses.

    Args:
        report: what was found.
        title: the port's name.
    """
    verdict = "healthy" if report.healthy else '<span class="bad">diverges</span>'
    body = [
        f"<h1>{escape(title)}: {verdict}</h1>",
        f"<p>Reference: {escape(report.reference)}. {report.seconds:.0f} s.</p>",
        _paths(report),
        _left_out(report),
        _layers(report),
        _gradients(report),
        _diagnoses(report),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _paths(report: Report) -> str:
    rows = [
        (
            each.path,
            str(each.tokens),
            f"{each.max_difference:.2e}",
            f"{each.greedy_equal} / {each.tokens}",
            "ok" if each.healthy else "DIVERGES",
        )
        for each in report.paths
    ]
    return _table(("path", "tokens", "max |difference|, nats", "greedy equal", ""), rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    rest = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{first}</tr>{rest}</table>"


def _left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    items = "".join(f"<li>{escape(each.what)}: {escape(each.why)}</li>" for each in report.left_out)
    return f"<h2>Left out</h2><ul>{items}</ul>"


def _layers(report: Report) -> str:
    if report.leaves_out("layers"):
        return ""
    return "<h2>Divergence by layer</h2>" + plot(report.spots) + _place(report.first)


def plot(spots: Sequence[Divergence]) -> str:
    """A bar for each spot, as high as the power of ten of its relative difference."""
    width = _LEFT + _BAR * len(spots) + 10
    lines = [
        f'<line x1="{_LEFT}" x2="{width}" y1="{_y(power):.1f}" y2="{_y(power):.1f}" stroke="#ddd"/>'
        f'<text x="0" y="{_y(power) + 4:.1f}" font-size="11">1e{power}</text>'
        for power in range(_SMALLEST, _LARGEST + 1)
    ]
    limit = _y(math.log10(LIMIT))
    lines.append(
        f'<line x1="{_LEFT}" x2="{width}" y1="{limit:.1f}" y2="{limit:.1f}" stroke="#b00020"/>'
    )
    bars = "".join(_bar(index, spot) for index, spot in enumerate(spots))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{_HEIGHT + 20}" '
        f'viewBox="0 -10 {width} {_HEIGHT + 20}">{"".join(lines)}{bars}</svg>'
    )


def _bar(index: int, spot: Divergence) -> str:
    top = _y(math.log10(spot.error) if spot.error > 0 else _SMALLEST)
    color = "#2b6cb0" if spot.error <= LIMIT else "#b00020"
    told = f"{spot.name} ({spot.role}): {spot.error:.2e}; {spot.value:.6g} for {spot.expected:.6g}"
    return (
        f'<rect x="{_LEFT + 4 + index * _BAR}" y="{top:.1f}" width="{_BAR - 3}" '
        f'height="{_HEIGHT - top:.1f}" fill="{color}"><title>{escape(told)}</title></rect>'
    )


def _y(power: float) -> float:
    share = (min(power, _LARGEST) - _SMALLEST) / (_LARGEST - _SMALLEST)
    return _HEIGHT * (1 - max(share, 0.0))


def _place(spot: Divergence | None) -> str:
    if spot is None:
        return "<p>No module is further from the reference's than the red line.</p>"
    return (
        f"<p>First apart at <code>{escape(spot.name)}</code> ({escape(spot.role)}): "
        f"{spot.value:.6g}, expected {spot.expected:.6g}, token {spot.token}.</p>"
    )


def _gradients(report: Report) -> str:
    if report.leaves_out("gradients"):
        return ""
    worst = sorted(report.gradients, key=lambda each: -each.error)[:10]
    told = f"<h2>Gradients</h2><p>{len(report.gradients)} weights compared; the furthest:</p>"
    return told + _table(
        ("weight", "relative difference"), [(each.name, f"{each.error:.2e}") for each in worst]
    )


def _diagnoses(report: Report) -> str:
    if not report.diagnoses:
        return ""
    items = "".join(f"<li>{escape(str(each))}</li>" for each in report.diagnoses)
    return f"<h2>Most likely faults</h2><ol>{items}</ol>"
