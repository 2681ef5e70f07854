"""One spelling for instructions that mean the same."""

import pytest

from wfm_core.curation.instructions import normalise_instruction


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Put the carrot on the plate.", "put the carrot on the plate"),
        ('  "put   the\ncarrot on the plate" ', "put the carrot on the plate"),
        ("“Put the carrot” on ‘it’", "put the carrot\" on 'it"),
        ("open , then close ;", "open, then close"),
        ("don’t touch it!", "don't touch it"),
        ("is it open?", "is it open?"),
        ("ＰＵＴ １", "put 1"),
        ("", ""),
        (' ". ', ""),
    ],
)
def test_spellings(text, expected):
    assert normalise_instruction(text) == expected == normalise_instruction(expected)
