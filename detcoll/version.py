"""The version: what the package is built with, what ranks compare when they meet, and what ``--version`` says."""

from __future__ import annotations

VERSION = "0.1.0"
