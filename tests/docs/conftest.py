"""The Hub on this machine, as the tests of hub.py have it."""

from tests.hub.conftest import hub

__all__ = ["hub"]
