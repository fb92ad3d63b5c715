"""A benchmark as one HTML page that needs nothing else: figures and tables, no script, for a desk and a phone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from fusedres.cli import plot, results, tables
from fusedres.cli.contest import EAGER
from fusedres.cli.peers import FROZEN
from fusedres.cli.plot import Drawn
from fusedres.cli.results import Result, Row
from fusedres.cli.tables import Table

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: #fff; color: #1c2430;
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 2px solid #1f6fb4; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p, dl { margin: .25rem 0 .75rem; max-width: 46rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; }
dt { color: #5b6675; } dd { margin: 0; overflow-wrap: anywhere; }
nav a { margin-right: 1rem; white-space: nowrap; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; max-width: 29rem; } figure img { width: 100%; height: auto; display: block; }
figcaption { color: #5b6675; font-size: .875rem; }
.headline { display: flex; flex-wrap: wrap; gap: .75rem; padding: 0; margin: .75rem 0; list-style: none; }
.headline li { border: 1px solid #d5dae1; border-radius: .5rem; padding: .5rem .9rem; }
.headline b { display: block; font-size: 1.5rem; line-height: 1.2; color: #1f6fb4; }
.headline small { display: block; color: #5b6675; font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e4e8ed; }
th { color: #5b6675; font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
details { margin: .75rem 0; } summary { cursor: pointer; color: #1f6fb4; }
"""


def draw(found: Sequence[Result]) -> list[list[Drawn]]:
    """The figures of each result; their names tell the results apart where there are several."""
    return [list(plot.figures(r, f"{i}-" if len(found) > 1 else "")) for i, r in enumerate(found, 1)]


def page(found: Sequence[Result], drawn: Sequence[Sequence[Drawn]]) -> str:
    """The whole document; ``drawn`` are the figures of each result."""
    title = "fusedres, measured"
    body = "".join(_result(f"result{i}", *both) for i, both in enumerate(zip(found, drawn, strict=True)))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        "<p>ResNets in eager PyTorch, by every peer that was installed, and fused; in each round all take a turn.</p>\n"
        f"{body}</body>\n</html>\n"
    )


def _result(anchor: str, result: Result, drawn: Sequence[Drawn]) -> str:
    sections = {network["arch"]: _network(result, network, drawn) for network in result["networks"]}
    if result.get("scaling"):
        sections["Scaling"] = (
            _scaling_verdict(result)
            + _figures(one for one in drawn if one.about == plot.SCALING)
            + "".join(map(_details, tables.scaling_tables(result)))
        )
    nav = "".join(f'<a href="#{anchor}-{i}">{escape(title)}</a>' for i, title in enumerate(sections))
    body = "".join(
        f'<h2 id="{anchor}-{i}">{escape(title)}</h2>\n{content}' for i, (title, content) in enumerate(sections.items())
    )
    head = f"<h2>{escape(results.machine_name(result))}</h2>\n{_facts(result)}<nav>{nav}</nav>\n"
    return f"<section>\n{head}{body}</section>\n"


def _facts(result: Result) -> str:
    versions = {name: version for name, version in result["versions"].items() if version}
    facts = {"measured": f"{result['date'][:10]}, commit {result['commit'] or 'unknown'}"}
    if "load" in result:
        before, after = (f"{result['load'][when][0]:.1f}" for when in ("before", "after"))
        facts["load"] = f"{before} processes a minute before, {after} after, on {result['machine']['cores']} cores"
    others = {
        "numbers": f"{result['settings']['dtype']}, memory mode {result['settings']['memory']}",
        "system": result["machine"]["system"],
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    if "roof" in result:
        roof = result["roof"]
        rates = f"{roof['bytes_per_s'] / 1e9:.1f} GB/s, {roof['flops_per_s'] / 1e9:.0f} GFLOP/s"
        others["roof"] = f"{rates} ({roof['source']})"
    return (
        f"{_list(facts)}<p>{escape(tables.how(result))}</p>\n"
        f"<details><summary>numbers, system and versions</summary>{_list(others)}</details>\n"
    )


def _list(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items()) + "</dl>\n"


def _headline(timing: Row) -> str:
    peers = {name: ratio for name, ratio in timing["ratio_to"].items() if name not in (*EAGER, FROZEN)}
    fastest = min(peers, key=lambda name: peers[name], default=None)
    beside = f"<small>{peers[fastest]:.2f}x {escape(fastest)}</small>" if fastest else ""
    return f"<li><b>{timing['ratio']:.2f}x</b>{escape(timing['mode'])}, batch {timing['batch']}{beside}</li>"


def _network(result: Result, network: Row, drawn: Sequence[Drawn]) -> str:
    headline = "".join(map(_headline, network["timings"]))
    times, *others = tables.network_tables(result, network)
    left_out = "".join(f"<li>{escape(line)}</li>" for line in tables.left_out(network))
    return (
        f"<p>Speed-up of fused over the faster of eager's two layouts, and over the fastest peer:</p>\n"
        f'<ul class="headline">{headline}</ul>\n'
        f"{_figures(one for one in drawn if one.about == network['arch'])}"
        f"<h3>{escape(times[0])}</h3>\n{_table(times)}"
        f"{''.join(_details(table) for table in others)}"
        f"{_details(tables.proof_table(network['proof']))}"
        + (f"<details><summary>who took no part, and why</summary><ul>{left_out}</ul></details>\n" if left_out else "")
    )


def _scaling_verdict(result: Result) -> str:
    worse = [
        table[0]
        for table in tables.scaling_tables(result)
        if any("faster:" in cell for row in table[2] for cell in row)
    ]
    if not worse:
        return "<p>Nowhere did the fused time grow faster than eager's by more than the spread of the rounds.</p>\n"
    where = "; ".join(worse)
    return f"<p>The fused time grew faster than eager's in: {escape(where)}. The tables say from where to where.</p>\n"


def _figures(drawn: Iterable[Drawn]) -> str:
    return f'<div class="figures">\n{"".join(map(_figure, drawn))}</div>\n'


def _figure(drawn: Drawn) -> str:
    data = base64.b64encode(drawn.svg()).decode()
    return (
        f'<figure><h3>{escape(drawn.title)}</h3><img alt="{escape(drawn.title)}; the tables below have the figures"'
        f' src="data:image/svg+xml;base64,{data}"><figcaption>{escape(drawn.caption)}</figcaption></figure>\n'
    )


def _details(table: Table) -> str:
    return f"<details><summary>{escape(table[0])}</summary>{_table(table)}</details>\n"


def _table(table: Table) -> str:
    _, columns, rows = table
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
