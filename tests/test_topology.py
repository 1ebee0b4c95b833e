"""Topologies: files are read exactly, bad ones are refused by name, and equal ones are equal everywhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detcoll.errors import UsageError
from detcoll.topology import LARGEST_WORLD, Link, Site, Topology

TWO = """
[[site]]
name = "guiyang"
ranks = 4
uplink = "1 Gbit/s"
[[site]]
name = "nanjing"
ranks = 2
uplink = "1 Gbit/s"
downlink = "2 Gbit/s"
[[link]]
between = ["guiyang", "nanjing"]
one_way = "10 ms"
asymmetry = "0.1 ms"
reserved = "800 Mbit/s"
"""

rates = st.one_of(st.integers(1, 10**12).map(float), st.floats(1e-3, 1e15))
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def topologies(draw) -> Topology:
    site_names = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    sites, first = [], 0
    for name in site_names:
        count = draw(st.integers(1, 9))
        up = draw(rates if len(site_names) > 1 else st.none() | rates)
        down = up if up is None or draw(st.booleans()) else draw(rates)
        sites.append(Site(name, tuple(range(first, first + count)), up, down))
        first += count
    links = []
    for pair in combinations(range(len(sites)), 2):
        one_way_ns = draw(st.integers(0, 10**12))
        asymmetry_ns = draw(st.integers(-2 * one_way_ns, 2 * one_way_ns))
        links.append((pair, Link(one_way_ns, asymmetry_ns, draw(st.none() | rates))))
    return Topology(tuple(sites), tuple(links), draw(st.integers(576, 65535)))


@given(topologies())
def test_a_topology_is_written_and_read_back_exactly(topology):
    read = Topology.parse(topology.to_toml(), topology.size)
    assert read == topology
    assert read.digest == topology.digest


@given(topologies())
def test_delays_there_and_back_differ_by_the_asymmetry(topology):
    for (low, high), link in topology.links:
        there_ns, back_ns = topology.one_way_ns(low, high), topology.one_way_ns(high, low)
        assert there_ns + back_ns in (2 * link.one_way_ns, 2 * link.one_way_ns - 1)
        assert there_ns - back_ns == link.asymmetry_ns
        assert min(there_ns, back_ns) >= 0


def test_a_file_is_read(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(TWO)
    topology = Topology.from_file(path, 6)
    assert topology.sites == (
        Site("guiyang", (0, 1, 2, 3), 125e6, 125e6),
        Site("nanjing", (4, 5), 125e6, 250e6),
    )
    assert topology.links == (((0, 1), Link(10_000_000, 100_000, 100e6)),)
    assert topology.size == 6
    assert [topology.site_of(rank) for rank in range(6)] == [0, 0, 0, 0, 1, 1]
    assert (topology.one_way_ns(0, 1), topology.one_way_ns(1, 0)) == (10_050_000, 9_950_000)
    assert topology.one_way_ns(1, 1) == 0
    assert topology.is_wide
    assert topology.payload_share == (1500 - 52) / 1500


def test_a_link_named_in_the_other_direction_is_turned():
    turned = TWO.replace('["guiyang", "nanjing"]', '["nanjing", "guiyang"]')
    assert Topology.parse(turned).links == (((0, 1), Link(10_000_000, -100_000, 100e6)),)


def test_the_baseline_has_the_same_groups_and_no_lines():
    wide = Topology.parse(TWO)
    single = wide.as_single_cluster()
    assert [site.ranks for site in single.sites] == [site.ranks for site in wide.sites]
    assert wide.is_wide
    assert not single.is_wide
    assert single.one_way_ns(0, 1) == 0
    assert single.digest != wide.digest


def test_uniform_is_what_the_file_would_say():
    topology = Topology.uniform(3, 2, 125_000_000, 10_000_000)
    assert topology == Topology.parse(topology.to_toml(), 6)
    assert topology.digest == Topology.uniform(3, 2, 125e6, 10_000_000).digest
    assert [site.ranks for site in topology.sites] == [(0, 1), (2, 3), (4, 5)]
    assert len(topology.links) == 3


def test_digests_tell_topologies_apart():
    base = Topology.uniform(2, 2, 1e6, 10)
    others = [
        Topology.uniform(2, 2, 1e6, 11), Topology.uniform(2, 2, 2e6, 10), Topology.uniform(2, 3, 1e6, 10),
        Topology.uniform(4, 1, 1e6, 10), Topology.uniform(2, 2, 1e6, 10, mtu_bytes=9000), Topology.single_site(4),
        replace(base, sites=base.sites[::-1]),
    ]  # fmt: skip
    assert len({topology.digest for topology in [base, *others]}) == len(others) + 1


def test_ranks_can_be_placed_in_any_order():
    placed = Topology.parse(TWO).placed(["nanjing", "guiyang", "guiyang", "nanjing", "guiyang", "guiyang"])
    assert [site.ranks for site in placed.sites] == [(1, 2, 4, 5), (0, 3)]
    assert placed.site_of(3) == 1
    assert placed.links == Topology.parse(TWO).links


@pytest.mark.parametrize(
    ("site_names", "words"),
    [
        (["guiyang"] * 5 + ["oslo"], r"rank 5 says it is in site 'oslo'; the topology has guiyang, nanjing"),
        (["guiyang"] * 5 + ["nanjing"], r"site 'guiyang' declares 4 ranks but 5 are in it"),
        (["guiyang"] * 4, r"site 'nanjing' declares 2 ranks but 0 are in it"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(site_names, words):
    with pytest.raises(UsageError, match=words):
        Topology.parse(TWO).placed(site_names)


def changed(old: str, new: str) -> str:
    assert TWO.count(old) >= 1
    return TWO.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("= nonsense", "wan.toml is not TOML"),
        ("", r"wan.toml needs tables of the form \[\[site\]\]"),
        ("site = []", r"wan.toml has no \[\[site\]\]"),
        ("site = [1]", r"tables of the form \[\[site\]\]"),
        ('[site]\nname = "a"\nranks = 1', r"tables of the form \[\[site\]\]"),
        ("sites = 3\n" + TWO, "wan.toml has unknown keys sites; expected link, mtu, site"),
        (changed('uplink = "1', 'up_link = "1'), "site 0 has unknown keys up_link; expected downlink, name, ranks"),
        (changed("one_way", "delay"), "link 0 has unknown keys delay; expected asymmetry, between, one_way"),
        (changed('name = "guiyang"', "name = 3"), r"site 0: name=3 must be a non-empty string"),
        (changed('name = "guiyang"', 'name = ""'), r"name='' must be a non-empty string"),
        (changed('name = "guiyang"\n', ""), "name=None must be a non-empty string"),
        (changed("ranks = 4\n", ""), "site 0: ranks=None must be a whole number from 1 to"),
        (changed("ranks = 4", "ranks = 0"), "ranks=0 must be"),
        (changed("ranks = 4", "ranks = -1"), "ranks=-1 must be"),
        (changed("ranks = 4", "ranks = true"), "ranks=True must be"),
        (changed("ranks = 4", "ranks = 1.5"), "ranks=1.5 must be"),
        (changed("ranks = 4", 'ranks = "4"'), "ranks='4' must be"),
        (changed("ranks = 4", f"ranks = {LARGEST_WORLD}"), f"declares {LARGEST_WORLD + 2} ranks; expected at most"),
        (changed('uplink = "1 Gbit/s"\n', ""), r"site 0 \('guiyang'\) has no uplink"),
        (changed('uplink = "1 Gbit/s"', 'uplink = "1"'), "site 0: uplink='1' has no unit"),
        (changed('uplink = "1 Gbit/s"', "uplink = 1"), "site 0: uplink=1 is not a quantity"),
        (changed('uplink = "1 Gbit/s"', 'uplink = "0 Gbit/s"'), "must be greater than zero"),
        (changed('downlink = "2 Gbit/s"', 'downlink = "20 ms"'), "site 1: downlink='20 ms' has the unknown unit 'ms'"),
        (changed('name = "nanjing"', 'name = "guiyang"'), "between names 'nanjing'; the sites are guiyang, guiyang"),
        (TWO.partition("[[link]]")[0], "wan.toml lacks 1 links: guiyang - nanjing"),
        ("link = 3\n" + TWO.partition("[[link]]")[0], r"tables of the form \[\[link\]\]"),
        (changed('"guiyang", "nanjing"', '"guiyang", "guiyang"'), "must name two different sites"),
        (changed('["guiyang", "nanjing"]', '"guiyang"'), "between='guiyang' must name two different sites"),
        (changed('"guiyang", "nanjing"', '"guiyang"'), "must name two different sites"),
        (changed('"guiyang", "nanjing"', '"guiyang", "oslo"'), "between names 'oslo'; the sites are guiyang, nanjing"),
        (changed('"guiyang", "nanjing"', '"guiyang", 3'), "between names 3"),
        (changed('one_way = "10 ms"\n', ""), "link 0: one_way=None must be a non-empty string"),
        (changed("10 ms", "10"), "link 0: one_way='10' has no unit"),
        (changed("0.1 ms", "0.1"), "link 0: asymmetry='0.1' has no unit"),
        (changed("0.1 ms", "21 ms"), "asymmetry='21 ms' exceeds the round trip"),
        (changed("800 Mbit/s", "800"), "link 0: reserved='800' has no unit"),
        (TWO + TWO[TWO.index("[[link]]") :], "the link between 'guiyang' and 'nanjing' is given twice"),
        ("mtu = 100\n" + TWO, "mtu=100 must be from 576 to 65535 bytes"),
        ("mtu = 1500.0\n" + TWO, "mtu=1500.0 must be a whole number"),
        ("mtu = true\n" + TWO, "mtu=True must be a whole number"),
    ],
)
def test_bad_files_are_refused(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        Topology.parse(text, name="wan.toml")
    assert str(caught.value).startswith("wan.toml")


def test_two_sites_of_one_name_are_refused():
    text = '[[site]]\nname = "a"\nranks = 1\nuplink = "1 GB/s"\n'
    with pytest.raises(UsageError, match="two sites of one name: a, a"):
        Topology.parse(text * 2)


def test_many_missing_links_are_not_all_listed():
    text = Topology.uniform(6, 1, 1e6, 10).to_toml().partition("[[link]]")[0]
    with pytest.raises(UsageError, match=r"lacks 15 links: site0 - site1, .*, \.\.\.$"):
        Topology.parse(text)


def test_the_world_must_have_as_many_ranks():
    with pytest.raises(UsageError, match="topology declares 6 ranks but the world has 8"):
        Topology.parse(TWO, 8)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("absent.toml", "bytes.toml", ""):
        with pytest.raises(UsageError, match=r"topology='.*' cannot be read"):
            Topology.from_file(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1, 1e6, 0), "sites=0"),
        ((1, 0, 1e6, 0), "ranks_per_site=0"),
        ((2, True, 1e6, 0), "ranks_per_site=True"),
        ((2, 1, 0, 0), "uplink_bytes_per_s=0 must be"),
        ((2, 1, float("inf"), 0), "uplink_bytes_per_s=inf"),
        ((2, 1, float("nan"), 0), "uplink_bytes_per_s=nan"),
        ((2, 1, 1e6, -1), "one_way_ns=-1"),
        ((2, 1, 1e6, 1e6), "one_way_ns=1000000.0 must be a whole number"),
        ((2, 1, 1e6, 0, 99), "mtu=99"),
        ((2, LARGEST_WORLD, 1e6, 0), "expected at most"),
    ],
)
def test_uniform_checks_its_arguments(arguments, words):
    with pytest.raises(UsageError, match=words):
        Topology.uniform(*arguments)


def test_single_site_checks_its_size():
    assert Topology.single_site(3).sites == (Site("local", (0, 1, 2)),)
    with pytest.raises(UsageError, match="size=0"):
        Topology.single_site(0)


def test_ranks_and_rates_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="rank=6 is in no site of a topology of 6 ranks"):
        Topology.parse(TWO).site_of(6)
    with pytest.raises(UsageError, match="uplink_bytes_per_s='1 Gbit/s' must be a number"):
        Site("a", (0,), "1 Gbit/s")


def test_what_is_granted_is_no_more_than_what_is_reserved():
    two = Topology.parse(TWO)
    assert two.has_reservations
    assert (two.reserved_bytes_per_s(0, 1), two.reserved_bytes_per_s(1, 0)) == (1e8, 1e8)
    assert [(site.uplink_bytes_per_s, site.downlink_bytes_per_s) for site in two.granted.sites] == [(1e8, 1e8)] * 2
    assert two.granted.granted == two.granted
    assert two.with_reserved(None).granted == two.with_reserved(None)
    assert two.with_reserved(5e8).granted.sites == two.sites


def test_links_of_one_site_are_used_at_once():
    four = Topology.uniform(4, 1, 1e8, 1000).with_reserved(2e7)
    one_less = replace(four, links=((four.links[0][0], Link(1000, 0, 1e7)), *four.links[1:]))
    assert [site.uplink_bytes_per_s for site in four.granted.sites] == [6e7] * 4
    assert [site.uplink_bytes_per_s for site in one_less.granted.sites] == [3e7, 3e7, 6e7, 6e7]
    some = replace(four, links=((four.links[0][0], Link(1000)), *four.links[1:]))
    assert some.granted.sites[0].uplink_bytes_per_s == 6e7
    assert four.reserved_bytes_per_s(2, 2) is None
