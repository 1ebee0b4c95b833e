"""Delays from places: fibre along a great circle that is longer by a route factor.

Distance is the haversine of two places on a sphere of the Earth's mean radius (IUGG, 6371.0088 km). Light in the fibre
goes at c over the group index, 1.468 for standard single-mode fibre at 1550 nm. Fibre follows railways, roads and
rivers, and equipment adds its own: the route factor stands for all of that.
"""

from __future__ import annotations

from math import asin, cos, radians, sin, sqrt

EARTH_RADIUS_KM = 6371.0088
LIGHT_KM_PER_S = 299_792.458

Position = tuple[float, float]
"""Latitude and longitude in degrees."""


def great_circle_km(a: Position, b: Position) -> float:
    """Return the length of the shortest way between two positions over the Earth's surface in km."""
    (latitude_a, longitude_a), (latitude_b, longitude_b) = ((radians(x), radians(y)) for x, y in (a, b))
    half = sin((latitude_b - latitude_a) / 2) ** 2
    half += cos(latitude_a) * cos(latitude_b) * sin((longitude_b - longitude_a) / 2) ** 2
    return 2 * EARTH_RADIUS_KM * asin(min(1.0, sqrt(half)))


def one_way_ns(distance_km: float, route_factor: float, refraction: float) -> int:
    """Return the one-way delay of fibre over a distance in nanoseconds."""
    return round(distance_km * route_factor * refraction / LIGHT_KM_PER_S * 1e9)
