"""Pictures: their geometry, what they say to those who do not see them, and that no text becomes markup."""

from __future__ import annotations

import pytest
from pictures import check_labels, number, of_class, parsed, svg_again, text_box, texts

from detcoll.draw import Axis, Bar, Curve, Place, bar_chart, curve_chart, element, html_text, site_map, svg_text
from detcoll.draw.charts import LARGEST_POINTS, thin_out
from detcoll.draw.labels import axis_labels, shortened, text_width, wrapped
from detcoll.draw.markup import clean, picture
from detcoll.draw.scale import Scale, linear_ticks, log_ticks, percent, plain, time_text
from detcoll.draw.style import DARK, LIGHT, SERIES, series_class
from detcoll.errors import UsageError

HOSTILE = "</title><script>alert(1)</script>\"'&\x00\x1b\u202e<b onload=x>"
PLAIN = Axis("values", str)


def test_text_and_attributes_never_become_markup() -> None:
    page = parsed(html_text(element("p", {"class": HOSTILE}, HOSTILE, element("b", None, "x"), HOSTILE)))
    assert page.tags == ["p", "b"]
    assert "".join(page.texts).count("<script>alert(1)</script>") == 2
    drawn = picture(10, 10, HOSTILE, HOSTILE)
    again = svg_again(svg_text(drawn))
    assert [node.tag.rpartition("}")[2] for node in again] == ["title", "desc", "style", "rect"]
    assert (
        clean("a\x00\u202eb\ud800") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}"
    )


def test_a_picture_scales_and_names_itself() -> None:
    drawn = picture(640, 200, "Bars", "three of them")
    assert (drawn.get("viewBox"), drawn.get("role")) == ("0 0 640 200", "img")
    assert [(node.tag, node.text) for node in drawn] == [("title", "Bars"), ("desc", "three of them")]
    alone = svg_again(svg_text(drawn))
    assert (alone.get("width"), alone.get("height")) == ("672", "232")
    assert drawn.get("width") is None, "the page's picture is left as it was"


def contrast(first: str, second: str) -> float:
    """WCAG 2.2: ratio of relative luminances, each raised by 0.05."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_colours_can_be_told_from_what_they_stand_on(colours: dict[str, str]) -> None:
    for name in ("text", "muted", *(f"s{index}" for index in range(SERIES))):
        assert contrast(colours[name], colours["surface"]) >= 4.5, name
    assert contrast(colours["text"], colours["page"]) >= 4.5
    assert contrast(colours["muted"], colours["page"]) >= 4.5


def test_series_beyond_the_colours_do_not_take_the_baselines_grey() -> None:
    assert [series_class(index) for index in range(8)] == ["s0", "s1", "s2", "s3", "s4", "s5", "s1", "s2"]


def test_ticks_are_round_and_lie_inside() -> None:
    assert linear_ticks(0, 1.09, 8) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert linear_ticks(3, 3, 5) == [3]
    assert log_ticks(20, 600, 8) == pytest.approx([20, 50, 100, 200, 500])
    assert log_ticks(1, 1e9, 4) == pytest.approx([1, 1e3, 1e6, 1e9])
    for most in range(2, 12):
        found = linear_ticks(-7.3, 1234.5, most)
        assert all(-7.3 <= tick <= 1234.5 for tick in found)
        assert 1 <= len(found) <= most


def test_scales_map_ends_to_ends() -> None:
    assert [Scale(0, 10, 100, 200)(value) for value in (0, 5, 10)] == [100, 150, 200]
    assert Scale(1, 100, 0, 200, log=True)(10) == pytest.approx(100)
    assert Scale(4, 4, 7, 9)(4) == 7


def test_figures_read_with_units() -> None:
    assert percent(0.4467) == "44.7\N{NO-BREAK SPACE}%"
    told = [time_text(value) for value in (0.02, 1.5, 2.5e-5, 3e-8, 0, -0.002, 16)]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in told] == [
        "20.0 ms", "1.50 s", "25.0 \N{MICRO SIGN}s", "30.0 ns", "0 ns", "-2.00 ms", "16.0 s",
    ]  # fmt: skip
    assert shortened("guiyang", 1000) == "guiyang"
    assert shortened("guiyang", 30).endswith("\N{HORIZONTAL ELLIPSIS}")


def test_a_figure_that_is_rounded_to_zero_has_no_sign() -> None:
    told = [percent(-0.00001, 2), percent(-0.0), percent(-0.0004, signed=True), time_text(-0.0), plain(-0.0)]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in told] == ["0.00 %", "0.0 %", "0.0 %", "0 ns", "0"]
    signed = [percent(value, signed=True) for value in (0.0123, -0.0123)]
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in signed] == ["+1.2 %", "-1.2 %"]


def test_texts_are_measured_by_their_characters() -> None:
    assert text_width("illi") < text_width("2222") < text_width("WWWW") < text_width("\u4e1c\u6570\u897f\u7b97", 14)
    assert text_width("slotted", bold=True) > text_width("slotted")
    assert text_width("slotted", 26) == pytest.approx(2 * text_width("slotted", 13))


def test_long_texts_are_broken_before_they_are_cut() -> None:
    text = "same plans, plain TCP, deterministic, others 100%"
    lines = wrapped(text, 200)
    assert " ".join(lines) == text
    assert len(lines) > 1
    assert all(text_width(line) <= 200 for line in lines)
    two = wrapped(text, 150, most=2)
    assert len(two) == 2
    assert two[1].endswith("\N{HORIZONTAL ELLIPSIS}")
    assert wrapped("x" * 99, 100) == [shortened("x" * 99, 100)]


def test_labels_of_an_axis_take_further_rows_before_they_are_left_out() -> None:
    rates = ["200 Gbit/s", "400 Gbit/s", "600 Gbit/s", "1.2 Tbit/s", "1.6 Tbit/s"]
    ticks = [(50.0 + 65 * at, text) for at, text in enumerate(rates)]
    placed = axis_labels(ticks, 0, 340, rows=3)
    assert [label.text for label in placed] == rates
    assert len({label.row for label in placed}) > 1
    one = axis_labels(ticks, 0, 340)
    assert {label.row for label in one} == {0}
    assert {one[0].text, one[-1].text} == {rates[0], rates[-1]}, "the outermost two stay"
    assert len(one) < len(rates)
    assert axis_labels([], 0, 340) == []


LONG = ("single cluster", "same plans, plain TCP, deterministic, others 100 %", "slotted, best-effort, others 50 %")


@pytest.mark.parametrize("width", [920.0, 340.0])
def test_names_and_figures_of_bars_cover_nothing(width: float) -> None:
    bars = [Bar(label, 1.0 + at, "403 ms (median 357 ms)", at) for at, label in enumerate(LONG)]
    drawn = bar_chart(bars, Axis("round trip, ms", plain), "t", width, 1.0, "one cluster")
    check_labels(drawn)
    assert texts(drawn).count("403 ms (median 357 ms)") == 3
    shown = " ".join(texts(drawn))
    assert all(label in shown for label in LONG), "no name is cut"
    marks = [(number(node, "x1"), number(node, "y1"), number(node, "y2")) for node in of_class(drawn, "dashed")]
    for left, top, right, bottom in map(text_box, drawn.iter("text")):
        assert not any(left < x < right and y1 < bottom and top < y2 for x, y1, y2 in marks), "no line crosses a text"


@pytest.mark.parametrize("width", [920.0, 340.0])
def test_every_point_that_was_tried_has_its_label(width: float) -> None:
    sizes = tuple(2.0**at for at in range(18, 27))
    curve = Curve(LONG[1], tuple((size, size) for size in sizes), has_markers=True)
    x = Axis("size", lambda size: f"{size / 2**20:g} MiB", ticks=sizes, may_be_log=True)
    drawn = curve_chart([curve, curve], x, Axis("time, ms", plain, may_be_log=True), "t", width)
    check_labels(drawn)
    assert {x.shown(size) for size in sizes} <= set(texts(drawn))
    assert LONG[1] in " ".join(texts(drawn))


@pytest.mark.parametrize("width", [920.0, 340.0])
def test_bars_are_in_proportion_and_whiskers_at_the_spread(width: float) -> None:
    bars = [Bar("one cluster", 1.0, "100 %"), Bar("slotted", 0.5, "50 %", 1, 0.4, 0.8), Bar("none", 0.0, "0 %", 2)]
    drawn = bar_chart(bars, PLAIN, "Efficiency", width, 1.0, "one cluster")
    whole, half, none = of_class(drawn, "fill", tag="rect")
    assert number(half, "width") == pytest.approx(number(whole, "width") / 2, abs=0.02)
    assert number(none, "width") == 0
    left, full = number(whole, "x"), number(whole, "width")
    across, *_ = of_class(drawn, "whisker")
    assert number(across, "x1") == pytest.approx(left + 0.4 * full, abs=0.02)
    assert number(across, "x2") == pytest.approx(left + 0.8 * full, abs=0.02)
    mark = of_class(drawn, "mark")[0]
    assert number(mark, "x1") == pytest.approx(left + full, abs=0.02)
    assert number(whole, "y") < number(half, "y") < number(none, "y")
    assert {"one cluster", "slotted", "100 %", "50 %"} <= set(texts(drawn)), "each bar is named and has its figure"
    for node in of_class(drawn, "fill"):
        assert number(node, "x") + number(node, "width") <= width


def test_a_whisker_may_reach_beyond_all_bars() -> None:
    drawn = bar_chart([Bar("a", 1.0, "1", 0, 0.5, 4.0)], PLAIN, "t", 700)
    right = max(number(node, "x2") for node in of_class(drawn, "whisker"))
    assert number(of_class(drawn, "fill")[0], "width") < right < 700


def test_no_bars_make_an_empty_picture() -> None:
    assert of_class(bar_chart([], PLAIN, "t", 700), "fill") == []


def polyline(node_points: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in node_points.split())]


def test_curves_run_through_their_points_from_zero() -> None:
    curve = Curve("slotted", ((0.0, 50.0), (1.0, 100.0), (2.0, 0.0)), 1, ((40.0, 60.0),), has_markers=True)
    drawn = curve_chart([curve], PLAIN, PLAIN, "t", 800)
    (x0, y0), (x1, y1), (x2, y2) = polyline(of_class(drawn, "curve")[1].attrib["points"])
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)
    assert y0 - y1 == pytest.approx(y2 - y0, abs=0.02), "larger is higher, and the scale is straight"
    spread = of_class(drawn, "whisker")[0]
    assert number(spread, "x1") == x0
    assert abs(number(spread, "y1") - number(spread, "y2")) == pytest.approx((y2 - y1) * 0.2, abs=0.05)
    assert "0" in {text.removesuffix(".0") for text in texts(drawn)}


def test_far_values_are_set_on_a_logarithmic_scale_that_says_so() -> None:
    curve = Curve("a", ((1.0, 1.0), (2.0, 10.0), (3.0, 100.0)))
    drawn = curve_chart([curve], PLAIN, Axis("time, ms", str, may_be_log=True), "t", 800)
    ys = [y for _, y in polyline(of_class(drawn, "curve")[1].attrib["points"])]
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.02)
    assert "time, ms, logarithmic" in texts(drawn)


def test_series_differ_by_dash_and_marker_too() -> None:
    curves = [Curve(str(index), ((0.0, 1.0), (1.0, 2.0)), index, has_markers=True) for index in range(6)]
    drawn = curve_chart(curves, PLAIN, PLAIN, "t", 900)
    assert len({node.get("stroke-dasharray") for node in of_class(drawn, "curve")}) == 6
    assert {str(index) for index in range(6)} <= set(texts(drawn))


def test_long_curves_keep_their_peaks() -> None:
    points = [(float(at), 1.0) for at in range(10_000)]
    points[4321] = (4321.0, 9.0)
    points[17] = (17.0, 0.25)
    kept = thin_out(points)
    assert len(kept) <= LARGEST_POINTS + 2
    assert {(4321.0, 9.0), (17.0, 0.25)} <= set(kept)
    assert kept == sorted(kept)
    assert thin_out(points[:100]) == points[:100]


def test_a_map_is_to_scale_with_north_up() -> None:
    places = [Place("south", 30.0, 110.0), Place("north", 31.0, 110.0), Place(HOSTILE, 30.0, 112.0)]
    drawn = site_map(places, [(0, 1), (0, 2)], 900)
    south, north, east = (
        (number(node, "cx"), number(node, "cy")) for node in of_class(drawn, "site", tag="circle")
    )  # fmt: skip
    assert north[1] < south[1]
    assert north[0] == south[0]
    shrink = 0.8624  # cos(30.5 degrees)
    assert (east[0] - south[0]) / 2 == pytest.approx((south[1] - north[1]) * shrink, rel=1e-3)
    first = of_class(drawn, "link")[0]
    assert (number(first, "x1"), number(first, "y1"), number(first, "x2"), number(first, "y2")) == (*south, *north)
    bar = of_class(drawn, "mark")[0]
    length_km = (number(bar, "x2") - number(bar, "x1")) / (south[1] - north[1]) * 111.195
    assert f"{length_km:.0f} km" in texts(drawn)
    svg_again(svg_text(drawn))


def test_names_on_a_map_do_not_cover_each_other() -> None:
    places = [Place(f"town{index}", 30 + index * 0.001, 110 + index * 0.001) for index in range(20)] + [
        Place("far", 40, 120)
    ]
    drawn = site_map(places, [], 400)
    assert len(of_class(drawn, "site")) == 21, "every site is there"
    check_labels(drawn)
    names = [text for text in texts(drawn) if text.startswith("town") or text == "far"]
    assert 1 < len(names) < 21
    assert "far" in names


@pytest.mark.parametrize(
    ("places", "links", "told"),
    [
        ([], [], "no site"),
        ([Place("a", 91, 0)], [], "latitude"),
        ([Place("a", float("nan"), 0)], [], "latitude"),
        ([Place("a", 1, 0)], [(0, 1)], "leads to no site"),
    ],
)
def test_maps_that_cannot_be_drawn_are_refused(places: list[Place], links: list[tuple[int, int]], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        site_map(places, links, 500)


def test_a_single_site_is_a_map_too() -> None:
    assert "alone" in texts(site_map([Place("alone", 0, 0)], [], 500))
