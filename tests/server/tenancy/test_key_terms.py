"""What a key's terms allow, over drawn networks and addresses."""

import ipaddress
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import Forbidden
from server.tenancy.key_terms import ALL_SCOPES, KeyInfo, as_ipv6, check_addresses, check_scopes, new_key_info

IPV4 = st.ip_addresses(v=4)
PAIRS = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(0, 32)),
    st.tuples(st.ip_addresses(v=6), st.integers(0, 128)),
)
NETWORKS = st.lists(
    PAIRS.map(lambda pair: str(ipaddress.ip_network(pair, strict=False))), min_size=1, max_size=4
)
NO_ADDRESSES = ["", "x", "10.0.0.256", "10.0.0.1:80", "[::1]", "1" * 10_000, "\ud800", "١٠.٠.٠.١"]


def key(*addresses: str, scopes: tuple[str, ...] = ALL_SCOPES, expires: int | None = None) -> KeyInfo:
    return KeyInfo("key_x", 0, scopes=scopes, expires=expires, addresses=check_addresses(addresses))


@given(NETWORKS, st.one_of(IPV4, st.ip_addresses(v=6)))
def test_a_key_with_networks_works_from_them_and_nowhere_else(
    networks: list[str], address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> None:
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    inside = any((mapped or address) in ipaddress.ip_network(stored) for stored in check_addresses(networks))
    assert key(*networks).allows(str(address)) == inside
    for stored in check_addresses(networks):
        assert key(*networks).allows(str(ipaddress.ip_network(stored)[0]))
    assert check_addresses(check_addresses(networks)) == check_addresses(networks)


@given(IPV4, IPV4, st.integers(0, 32))
def test_an_ipv4_address_is_one_however_it_is_written(
    address: ipaddress.IPv4Address, other: ipaddress.IPv4Address, prefix: int
) -> None:
    network = str(ipaddress.ip_network((other, prefix), strict=False))
    assert check_addresses([as_ipv6(network)]) == (network,)
    written = key(network), key(as_ipv6(network))
    assert len({each.allows(text) for each in written for text in (str(address), f"::ffff:{address}")}) == 1


@given(NETWORKS, NETWORKS, st.data())
def test_a_key_that_is_covered_works_nowhere_that_its_maker_does_not(
    makers: list[str], made: list[str], data: st.DataObject
) -> None:
    maker, new = key(*makers), key(*made)
    try:
        maker.check_covers(new)
    except Forbidden:
        return
    network = ipaddress.ip_network(data.draw(st.sampled_from(new.addresses)))
    address = network[data.draw(st.integers(0, network.num_addresses - 1))]
    assert maker.allows(str(address))


@pytest.mark.parametrize(
    "text", ["", "x", "10.0.0.256", "10.0.0.1:80", "[::1]", "1" * 10_000, "\ud800", "١٠.٠.٠.١"]
)
def test_what_is_no_address_is_allowed_nowhere(text: str) -> None:
    assert not key("0.0.0.0/0", "::/0").allows(text)
    assert key().allows(text)


def test_a_link_local_address_is_known_with_its_interface() -> None:
    assert key("fe80::/10").allows("fe80::1%eth0")


@given(st.sets(st.sampled_from(ALL_SCOPES), min_size=1), st.sets(st.sampled_from(ALL_SCOPES), min_size=1))
def test_scopes_are_covered_by_more_of_them_alone(one: set[str], other: set[str]) -> None:
    maker, made = key(scopes=check_scopes([*one])), key(scopes=check_scopes([*other]))
    if other <= one:
        maker.check_covers(made)
        return
    with pytest.raises(Forbidden) as refused:
        maker.check_covers(made)
    assert refused.value.code == "insufficient_permissions"


def test_a_key_outlives_no_key_that_made_it() -> None:
    now = int(time.time())
    key(expires=now + 60).check_covers(key(expires=now + 60))
    for longer in (now + 61, None):
        with pytest.raises(Forbidden, match="a longer life than this key"):
            key(expires=now + 60).check_covers(key(expires=longer))


def test_an_expiry_is_a_moment() -> None:
    info = new_key_info("key_x", 1000.5, expires_in=10)
    assert info.expires == 1010
    assert [info.has_expired(at) for at in (1009.9, 1010.0, 1011.0)] == [False, True, True]
