"""Lines of other libraries are held back, and only for so long."""

import logging

import pytest

from nextblock.logs import held_back


def test_lines_below_the_level_are_held_back_and_levels_come_back_even_after_an_error(caplog):
    one, two = logging.getLogger("of.one"), logging.getLogger("of.two")
    one.setLevel(logging.INFO)
    with pytest.raises(KeyError), held_back(logging.ERROR, "of.one", "of.two"):
        one.warning("held")
        two.error("told")
        raise KeyError
    one.info("told again")
    assert caplog.messages == ["told", "told again"]
    assert (one.level, two.level) == (logging.INFO, logging.NOTSET)
    one.setLevel(logging.NOTSET)
