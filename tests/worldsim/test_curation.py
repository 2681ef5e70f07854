"""What curation of episodes and of video share: findings in files, deadly items, the card's parts."""

from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from deadly import DEADLY, examine, killed

from wfm_core.curation.rules import Rule
from wfm_core.data.files import DataError
from worldsim import curation
from worldsim.curation import (
    UNREADABLE,
    Verdict,
    contact_sheet,
    drop_table,
    examine_all,
    histograms,
    nothing_kept,
    range_table,
    read_findings,
)


def all_of(tmp_path, **changes):
    settings = {"killed": killed, "unit": "item", "workers": 2, "executor": "local"} | changes
    examine_all(partial(examine, tmp_path / "log"), range(6), tmp_path / "found", **settings)
    return list(read_findings(tmp_path / "found", 6))


def test_an_item_that_kills_its_reader_costs_itself_alone(tmp_path):
    (tmp_path / "found").mkdir()
    found = all_of(tmp_path)
    assert found == [{"item": k, "error": "killed" if k == DEADLY else ""} for k in range(6)]
    assert len(list((tmp_path / "found").iterdir())) == 6  # no marks are left
    tries = Counter((tmp_path / "log").read_text().split())
    assert tries[str(DEADLY)] == 2  # among others, then alone
    all_of(tmp_path)
    assert Counter((tmp_path / "log").read_text().split()) == tries  # nothing is examined again


def test_workers_that_die_before_they_begin_are_no_items_fault(tmp_path, monkeypatch):
    def run_all(function, arguments, workers, executor="local"):
        raise curation.BrokenProcessPool("killed")

    monkeypatch.setattr(curation, "run_all", run_all)
    (tmp_path / "found").mkdir()
    with pytest.raises(curation.BrokenProcessPool):
        all_of(tmp_path)
    assert list((tmp_path / "found").iterdir()) == []


def test_workers_that_leave_nothing_do_not_keep_us_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(curation, "run_all", lambda *_: iter(()))  # as if they wrote to another disk
    (tmp_path / "found").mkdir()
    with pytest.raises(OSError, match=r"examine: workers must write to .*, but left nothing; do all of them see it\?"):
        all_of(tmp_path)


def test_the_card_says_what_was_dropped_and_what_is_kept():
    counts = Counter({"": 5, "dark": 2, "copy": 1})
    assert drop_table(counts, {"dark": Rule("luma", low=20), "loud": Rule("x")}, {"copy": "> 0.1"}, "clips") == [
        "| dropped | clips | measured | kept within |",
        "|---|---|---|---|",
        "| dark | 2 | luma | [20, inf] |",
        "| copy | 1 |  | > 0.1 |",
    ]
    assert range_table({"luma": [3, 9, 4]})[2:] == ["| luma | 3 | 4 | 9 |"]
    said = str(nothing_kept(["dark", "dark", "cut"], "clips", Path("out")))
    assert said == "nothing is kept of 3 clips: 2 dark, 1 cut; out/CARD.md and manifest.parquet say why"


def test_histograms_take_whatever_was_measured():
    """Nothing, all the same, the same but for rounding, half of it unknown."""
    for column in ([], [2.0, 2.0], [2.0, 2.0 + 4e-16], [np.nan, 3.0], [0.0, 0.0]):
        kept = np.arange(len(column)) < 1
        charts = cv2.imdecode(np.frombuffer(histograms({"seconds": np.array(column)}, kept, "clips"), np.uint8), 1)
        assert charts.shape == (300, 1200, 3)


def test_a_row_of_the_contact_sheet_is_a_reason():
    verdicts = [Verdict("dark"), *[Verdict()] * 8, Verdict(UNREADABLE)]

    def show(k):
        if k == 3:
            raise DataError("shows nothing")
        return np.full((96, 128, 3), 10 * k)

    sheet = cv2.imdecode(np.frombuffer(contact_sheet(verdicts, show), np.uint8), 1)
    assert sheet.shape == (2 * 112, 6 * 128, 3)
    assert [sheet[60, 128 * k + 64, 0] for k in range(6)] == [10, 20, 255, 40, 50, 60]
    assert [sheet[112 + 60, 128 * k + 64, 0] for k in range(2)] == [0, 255]
