"""What an API key may do, until when, and from where. Knows no storage and no route.

A key without scopes of its own has all of them, also those of later versions. Addresses are networks (CIDRs);
an IPv4 address that is written as an IPv6 one is the IPv4 address.
"""

import ipaddress
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from server.errors import Forbidden, InvalidField, shown

Scope = Literal["inference", "adapters", "fine-tune", "read"]
ALL_SCOPES: tuple[str, ...] = get_args(Scope)
MAX_NAME = 64
MAX_ADDRESSES = 32
MAX_ADDRESS_CHARS = 64
MAX_LIFE_SECONDS = 10 * 365 * 86_400
MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class KeyInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The public part of a key: neither its secret nor anything derived from it."""

    id: str
    created: int  # Unix seconds
    name: str = ""  # only displayed
    scopes: tuple[str, ...] = ALL_SCOPES
    expires: int | None = None  # Unix seconds
    addresses: tuple[str, ...] = ()  # networks; none: from anywhere

    @property
    def is_full(self) -> bool:
        return set(ALL_SCOPES) <= set(self.scopes)

    def has_expired(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now

    def allows(self, address: str) -> bool:
        """Whether a request from `address` may use the key; text that is no address never may."""
        if not self.addresses:
            return True
        try:
            client = ipaddress.ip_address(address.partition("%")[0])
        except ValueError:
            return False
        if isinstance(client, ipaddress.IPv6Address) and client.ipv4_mapped:
            client = client.ipv4_mapped
        return any(client in ipaddress.ip_network(network) for network in self.addresses)

    def check_covers(self, other: "KeyInfo") -> None:
        """Raise Forbidden if `other`, which this key of the same owner makes or rotates, may do more."""
        if not set(other.scopes) <= set(self.scopes):
            more = ", ".join(sorted(set(other.scopes) - set(self.scopes)))
            raise _beyond(f"scopes that this key lacks: {more}", "scopes")
        if self.expires is not None and (other.expires is None or other.expires > self.expires):
            raise _beyond("a longer life than this key", "expires_at")
        if self.addresses and not (
            other.addresses and all(_within(network, self.addresses) for network in other.addresses)
        ):
            raise _beyond("addresses that this key may not be used from", "addresses")


def new_key_info(
    id_: str,
    now: float,
    *,
    name: str = "",
    scopes: Sequence[str] | None = None,
    expires_at: int | None = None,
    expires_in: int | None = None,
    addresses: Sequence[str] = (),
) -> KeyInfo:
    """Checked terms, in one order and form. Raises InvalidField."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise InvalidField(
            f"name {shown(name)} must have at most {MAX_NAME} printable characters.", param="name"
        )
    return KeyInfo(
        id=id_,
        created=int(now),
        name=name,
        scopes=ALL_SCOPES if scopes is None else check_scopes(scopes),
        expires=_expiry(now, expires_at, expires_in),
        addresses=check_addresses(addresses),
    )


def check_scopes(scopes: Sequence[str]) -> tuple[str, ...]:
    """Each once, in the order of ALL_SCOPES. Raises InvalidField for an unknown one, and for none."""
    known = ", ".join(ALL_SCOPES)
    for scope in scopes:
        if scope not in ALL_SCOPES:
            raise InvalidField(f"scopes must be among {known}, not {shown(scope)}.", param="scopes")
    if not scopes:
        raise InvalidField(f"scopes must name at least one of {known}.", param="scopes")
    return tuple(scope for scope in ALL_SCOPES if scope in scopes)


def check_addresses(addresses: Sequence[str], param: str = "addresses") -> tuple[str, ...]:
    """The networks as ipaddress writes them. Raises InvalidField."""
    if len(addresses) > MAX_ADDRESSES:
        raise InvalidField(
            f"{param} must be at most {MAX_ADDRESSES} networks, not {len(addresses)}.", param=param
        )
    return tuple(dict.fromkeys(str(_network(text, param)) for text in addresses))


def as_ipv6(network: str) -> str:
    """How an IPv4 network looks to a socket of both versions; an IPv6 one as it is."""
    parsed = ipaddress.ip_network(network)
    if isinstance(parsed, ipaddress.IPv6Network):
        return network
    return f"::ffff:{parsed.network_address}/{parsed.prefixlen + MAPPED.prefixlen}"


def _network(text: str, param: str) -> Network:
    try:
        if len(text) > MAX_ADDRESS_CHARS or "%" in text:
            raise ValueError
        network = ipaddress.ip_network(text)
    except ValueError:
        raise InvalidField(
            f"{param} must be networks from their first address on, such as 10.0.0.0/8 or 2001:db8::/32, "
            f"not {shown(text)}.",
            param=param,
        ) from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(MAPPED):
        first = int(network.network_address) - int(MAPPED.network_address)
        return ipaddress.IPv4Network((first, network.prefixlen - MAPPED.prefixlen))
    return network


def _within(network: str, others: Sequence[str]) -> bool:
    inner = ipaddress.ip_network(network)
    outers = (ipaddress.ip_network(other) for other in others)
    return any(
        inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]
        for outer in outers
    )


def _expiry(now: float, at: int | None, seconds: int | None) -> int | None:
    """Unix seconds. Raises InvalidField for a time in the past, beyond MAX_LIFE_SECONDS, or given twice."""
    if at is not None and seconds is not None:
        raise InvalidField("expires_at and expires_in exclude each other.", param="expires_in")
    if at is None and seconds is None:
        return None
    param = "expires_at" if seconds is None else "expires_in"
    expires = at if at is not None else int(now) + (seconds or 0)
    if expires <= now:
        raise InvalidField(
            f"{param} {shown(at if seconds is None else seconds)} is in the past.", param=param
        )
    if expires > now + MAX_LIFE_SECONDS:
        raise InvalidField(f"{param} must be within ten years, not {shown(at or seconds)}.", param=param)
    return expires


def _beyond(what: str, param: str) -> Forbidden:
    return Forbidden(f"The key would have {what}.", param=param, code="insufficient_permissions")
