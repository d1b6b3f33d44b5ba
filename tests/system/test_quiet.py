"""quiet(): other packages' loggers say nothing while they work for us, and what they said before afterwards, whatever
happens."""

from __future__ import annotations

import logging

import pytest

from rarefy.system.quiet import quiet


def test_loggers_are_quiet_inside_and_as_they_were_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    one, other = logging.getLogger("rarefy.test.one"), logging.getLogger("rarefy.test.other")
    one.setLevel(logging.INFO)
    with pytest.raises(ValueError, match="inside"), quiet("rarefy.test.one", "rarefy.test.other"):
        one.error("not said")
        other.warning("not said")
        raise ValueError("inside")
    one.info("said")
    assert caplog.messages == ["said"]
    assert (one.level, other.level) == (logging.INFO, logging.NOTSET)
