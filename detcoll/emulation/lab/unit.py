"""Units: what one read of a TUN device gives.

With segmentation offload a unit is a `virtio_net_hdr` followed by one IPv4 packet that stands for several segments
on the wire: the kernel hands over one large packet and says in ``gso_size`` how much payload a segment takes. On a
real line each of those segments has headers of its own, so the router charges

    wire bytes = payload + segments * (IP header + TCP header)

and loses or drops single segments. `cut` gives the unit that holds a run of segments of another, with lengths,
sequence number, identification, flags and checksums as the kernel would have written them. Header layout: virtio 1.2,
section 5.1.6; Linux ``include/uapi/linux/virtio_net.h``.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

VNET_HEADER = struct.Struct("=BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: native byte order, as TUN gives them by default."""

VNET_HEADER_BYTES = VNET_HEADER.size
NEEDS_CSUM = 1
TCP = 6
UDP = 17

_GSO_ECN = 0x80
_TCP_FIN_PSH = 0x09
_TCP_CWR = 0x80
_IP = VNET_HEADER_BYTES
_LITTLE = struct.pack("=H", 1)[0] == 1
_ADDRESSES = struct.Struct("!II")
_PORTS = struct.Struct("!HH")


class Shape(NamedTuple):
    """How a unit looks on the wire.

    ``header_bytes`` are those of every segment, ``payload_bytes`` is TCP or UDP payload, ``segment_bytes`` the payload
    of each segment but the last, ``wire_bytes`` counts IP packets and no link framing.
    """

    protocol: int
    header_bytes: int
    payload_bytes: int
    segment_bytes: int
    segments: int
    wire_bytes: int

    def wire_bytes_of(self, segments: int) -> int:
        """Return the wire bytes of the first ``segments`` segments."""
        return min(segments * self.segment_bytes, self.payload_bytes) + segments * self.header_bytes


def shape_of(unit: bytes) -> Shape:
    """Return the shape of an IPv4 unit.

    Raises
    ------
    ValueError
        If it is too short to be one.
    """
    size = len(unit) - _IP
    if size < 20:
        raise ValueError(f"a unit of {len(unit)} bytes holds no IPv4 packet")
    ip_bytes = (unit[_IP] & 15) * 4
    protocol = unit[_IP + 9]
    headers = ip_bytes
    # Only the first fragment of a packet has the header of its transport.
    if not (unit[_IP + 6] & 0x1F or unit[_IP + 7]):
        if protocol == TCP and size >= ip_bytes + 20:
            headers += (unit[_IP + ip_bytes + 12] >> 4) * 4
        elif protocol == UDP:
            headers += 8
    if headers > size:
        raise ValueError(f"a unit of {len(unit)} bytes is shorter than its headers of {headers} bytes")
    payload = size - headers
    # Only of TCP does the kernel hand over runs of segments; what else claims to be one is not cut.
    if unit[1] and protocol == TCP and headers >= ip_bytes + 20:
        segment = unit[4] | unit[5] << 8 if _LITTLE else unit[4] << 8 | unit[5]
        if 0 < segment < payload:
            segments = -(-payload // segment)
            return Shape(protocol, headers, payload, segment, segments, payload + segments * headers)
    return Shape(protocol, headers, payload, payload, 1, size)


def flow_of(unit: bytes) -> tuple[int, int, int, int]:
    """Return source and destination address, source and destination port; ports are 0 where there are none."""
    source, destination = _ADDRESSES.unpack_from(unit, _IP + 12)
    ports = _IP + (unit[_IP] & 15) * 4
    fragment = unit[_IP + 6] & 0x1F or unit[_IP + 7]
    if fragment or unit[_IP + 9] not in (TCP, UDP) or len(unit) < ports + 4:
        return source, destination, 0, 0
    source_port, destination_port = _PORTS.unpack_from(unit, ports)
    return source, destination, source_port, destination_port


def cut(unit: bytes, shape: Shape, first: int, end: int) -> bytes:
    """Return the unit that holds segments ``first`` to ``end`` (exclusive) of ``unit``.

    ``unit`` is TCP, as everything is that has more than one segment.
    """
    if first == 0 and end == shape.segments:
        return unit
    ip_bytes = (unit[_IP] & 15) * 4
    tcp = _IP + ip_bytes
    payload_at = _IP + shape.header_bytes
    payload = unit[payload_at + first * shape.segment_bytes : payload_at + end * shape.segment_bytes]
    made = bytearray(unit[:payload_at])
    gso_type = unit[1]
    last = end == shape.segments
    if first:
        made[tcp + 13] &= 0xFF ^ _TCP_CWR
        gso_type &= 0xFF ^ _GSO_ECN
    if not last:
        made[tcp + 13] &= 0xFF ^ _TCP_FIN_PSH
    single = end - first == 1
    VNET_HEADER.pack_into(
        made, 0, NEEDS_CSUM, 0 if single else gso_type, shape.header_bytes, 0 if single else shape.segment_bytes,
        ip_bytes, 16,
    )  # fmt: skip
    sequence = int.from_bytes(unit[tcp + 4 : tcp + 8], "big") + first * shape.segment_bytes
    made[tcp + 4 : tcp + 8] = (sequence & 0xFFFFFFFF).to_bytes(4, "big")
    identification = int.from_bytes(unit[_IP + 4 : _IP + 6], "big") + first
    made[_IP + 4 : _IP + 6] = (identification & 0xFFFF).to_bytes(2, "big")
    made[_IP + 2 : _IP + 4] = (shape.header_bytes + len(payload)).to_bytes(2, "big")
    made[_IP + 10 : _IP + 12] = b"\0\0"
    made[_IP + 10 : _IP + 12] = (0xFFFF ^ _ones_sum(made[_IP:tcp])).to_bytes(2, "big")
    # The receiver finishes a partial checksum from csum_start on; what stands there is the sum of the pseudo header.
    pseudo = made[_IP + 12 : _IP + 20] + struct.pack("!HH", TCP, shape.header_bytes - ip_bytes + len(payload))
    made[tcp + 16 : tcp + 18] = _ones_sum(pseudo).to_bytes(2, "big")
    return bytes(made) + payload


def _ones_sum(data: bytes | bytearray) -> int:
    """Return the 16-bit one's complement sum of RFC 1071, not complemented."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
