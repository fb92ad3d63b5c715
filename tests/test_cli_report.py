"""``fusedres report``: ratios and their spread, comparisons, the page and its figures. No figure here was measured."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import made_results as made
import pytest

from fusedres import cli
from fusedres.cli import page, plot, results, scaling, tables
from fusedres.cli.contest import CHANNELS_LAST, FUSED, NCHW
from fusedres.cli.peers import FROZEN
from fusedres.cli.results import Ratio


def stored(folder: Path, name: str, result: dict[str, Any]) -> str:
    path = folder / name
    path.write_text(json.dumps(result))
    return str(path)


def eval_of(fused: float, jitter: float = 0.0, peer: float = 0.05) -> dict[str, Any]:
    return made.timing("eval", 8, made.samples(jitter, nchw=0.09, channels_last=0.08, peer=peer, fused=fused))


@pytest.fixture
def result() -> dict[str, Any]:
    training = made.timing("train", 8, made.samples(0.05, nchw=0.3, channels_last=0.25, fused=0.2))
    return made.result(eval_of(0.04, jitter=0.1), training)


# Ratios


def test_a_ratio_is_the_median_over_rounds_so_that_a_drift_of_the_machine_cancels() -> None:
    drift = [1.0, 1.0, 3.0, 3.0, 3.0]
    taken = {"peer": [2 * d for d in drift], FUSED: drift}
    assert Ratio.of(taken, "peer") == (2.0, 0.0)
    assert Ratio.of({"peer": [1.0, 2.0, 3.0, 4.0, 5.0], FUSED: [1.0] * 5}, "peer") == (3.0, 2.0)


def test_speed_up_is_over_the_faster_eager_layout_whatever_peers_do() -> None:
    row = results.row_of(made.samples(nchw=0.09, channels_last=0.08, peer=0.01, fused=0.04), 8)
    assert row["ratio"] == pytest.approx(2)
    assert row["ratio_to"] == pytest.approx({NCHW: 2.25, CHANNELS_LAST: 2, "peer": 0.25})
    assert row["images_per_s"][FUSED] == pytest.approx(200)


@pytest.mark.parametrize(("new", "fell"), [(Ratio(1.4, 0.1), False), (Ratio(1.3, 0.1), True), (Ratio(1.3, 0.2), False)])
def test_a_ratio_fell_where_both_spreads_together_do_not_explain_it(new: Ratio, fell: bool) -> None:
    assert Ratio(1.5, 0.1).fell_to(new) is fell


# Comparisons


def test_compare_flags_what_fell_and_says_so_by_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old, slower = (stored(tmp_path, f"{s}.json", made.result(eval_of(s, jitter=0.05))) for s in (0.04, 0.06))
    assert cli.main(["report", "--compare", old, slower]) == 1
    out = capsys.readouterr().out
    assert out.count("FELL") == 3
    assert "3 of 3 ratios fell" in out
    assert cli.main(["report", "--compare", slower, old]) == 0
    assert "FELL" not in capsys.readouterr().out


def test_compare_takes_noise_for_noise(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = [stored(tmp_path, f"{s}.json", made.result(eval_of(s, jitter=0.2))) for s in (0.040, 0.044)]
    assert cli.main(["report", "--compare", *files]) == 0
    assert "0 of 3 ratios fell" in capsys.readouterr().out


def test_compare_names_what_was_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    old = stored(tmp_path, "old.json", made.result(eval_of(0.04)))
    without = made.timing("eval", 8, made.samples(nchw=0.09, channels_last=0.08, fused=0.04))
    assert cli.main(["report", "--compare", old, stored(tmp_path, "new.json", made.result(without))]) == 0
    assert "not measured again: resnet50 224 eval 8 peer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": {"threads": 4}}, "the threads differs: 2 and 4"),
        ({"settings": {"dtype": "bfloat16"}}, "the dtype differs"),
        ({"settings": {"rounds": 2}}, "fewer than 4 rounds"),
        ({"networks": []}, "no measurement in common"),
    ],
)
def test_compare_refuses_what_tells_nothing(change: dict, message: str, tmp_path: Path, capsys) -> None:
    old = made.result(eval_of(0.04))
    new = old | {key: old[key] | value if isinstance(value, dict) else value for key, value in change.items()}
    argv = ["report", "--compare", stored(tmp_path, "old.json", old), stored(tmp_path, "new.json", new)]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_result_of_one_network_from_before_is_read(tmp_path: Path) -> None:
    new = made.result(eval_of(0.04))
    (network,) = new["networks"]
    old = {key: new[key] for key in ("date", "commit", "machine", "versions")} | {"schema": 1}
    old["settings"] = new["settings"] | {key: network[key] for key in ("arch", "image_size", "eager")}
    old |= {key: network[key] for key in ("proof", "launches", "saved_bytes_per_image")}
    old["timings"] = [{key: t[key] for key in ("mode", "batch", "samples_s")} for t in network["timings"]]
    path = stored(tmp_path, "old.json", old)
    read = results.read(Path(path))
    assert read["networks"][0]["timings"][0]["ratio"] == pytest.approx(2)
    assert cli.main(["report", "--compare", path, stored(tmp_path, "new.json", new)]) == 0


# Scaling


def test_growth_faster_than_eagers_is_named_with_where_it_is() -> None:
    rows = [made.point("batch", "eval", n, 0.02 * n, t) for n, t in ((1, 0.01), (2, 0.02), (4, 0.05), (8, 0.1))]
    assert [(a["value"], b["value"]) for a, b in scaling.faster_growth(rows)] == [(2, 4)]
    (table,) = tables.scaling_tables({"scaling": rows})
    assert [row[5] for row in table[2]] == ["-", "no faster", "faster: 2.00x to 1.60x", "no faster"]


# The page


class Outline(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*found: dict[str, Any]) -> str:
    return page.page(found, page.draw(found))


@pytest.fixture
def outline(result: dict[str, Any], tmp_path: Path) -> Outline:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    target = tmp_path / "made" / "page.html"
    assert cli.main(["report", stored(tmp_path, "r.json", result), "--html", str(target)]) == 0
    found = Outline()
    found.feed(target.read_text(encoding="utf-8"))
    return found


def test_page_needs_no_script_and_nothing_from_elsewhere(outline: Outline) -> None:
    assert not {"script", "link", "iframe"} & set(outline.tags)
    assert all(source.startswith(("data:image/svg+xml;base64,", "#")) for source in outline.sources)


def test_page_has_every_figure_and_table(outline: Outline, result: dict[str, Any]) -> None:
    assert outline.tags.count("img") == len(list(plot.figures(result))) == 5
    shown = [*tables.network_tables(result, result["networks"][0]), *tables.scaling_tables(result)]
    assert outline.tags.count("table") == len(shown) + 1  # and the proof
    for _, _, rows in shown:
        assert all(cell in outline.text for row in rows for cell in row)
    for fact in ("2.00x", "abacus", "0123456789ab", "torch 2.14.1", "it does not train", "Nowhere did the fused time"):
        assert fact in outline.text


def test_page_of_two_results_has_a_section_for_each(result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    found = Outline()
    found.feed(page_of(result, result | {"scaling": []}))
    assert found.tags.count("section") == 2
    assert found.tags.count("img") == 5 + 4


def test_fused_with_frozen_weights_is_no_peer_to_be_faster_than() -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    taken = {**made.samples(nchw=0.09, channels_last=0.08, OpenVINO=0.05, fused=0.04), FROZEN: made.rounds(0.03)}
    found = page_of(made.result(made.timing("eval", 1, taken)))
    assert "<small>1.25x OpenVINO</small>" in found
    assert f"x {FROZEN}</small>" not in found


def test_names_in_a_result_are_text_not_markup(result: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    result["networks"][0]["arch"] = result["machine"]["cpu"] = "<script>alert(1)</script>"
    assert "<script>" not in page_of(result)


def test_figures_are_written_as_png_and_svg(result: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    folder = tmp_path / "plots"
    assert cli.main(["report", stored(tmp_path, "r.json", result), "--plots", str(folder)]) == 0
    stems = {"resnet50-ratios", "resnet50-traffic", "resnet50-roofline", "resnet50-memory", "scaling-batch"}
    assert {path.name for path in folder.iterdir()} == {
        f"{stem}{suffix}" for stem in stems for suffix in (".png", ".svg")
    }
    assert all(path.stat().st_size > 1000 for path in folder.iterdir())


@pytest.mark.parametrize("argv", [[], ["a.json", "--compare", "b.json", "c.json"], ["nowhere.json"]])
def test_what_report_refuses(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", *argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1
