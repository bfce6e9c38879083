"""How long services are waited for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long a server is waited for."""

    attempts: int = 5
    """Tries of one request before it is given up."""
    first_pause_s: float = 1.0
    """Before the second try; doubles with each further one. A server's Retry-After counts if it is longer."""
    longest_pause_s: float = 60.0
    """A server that asks for more is taken at its word and not asked again."""
    connect_s: float = 10.0
    """For a connection to be made."""
    silence_s: float = 30.0
    """Between two bytes."""


PATIENCE = Patience()
