"""The table of certificates: the doctor on the zoo, and a page that has all of it."""

from __future__ import annotations

import pytest

from tests.zoo.certificates import PAGE, SUBJECTS, certified, examine, row

FAST = ("gemma2",)


def test_the_page_has_every_architecture_and_all_are_certified():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == list(SUBJECTS)
    assert all(line.endswith("| certified |") for line in lines)


@pytest.mark.engine
@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SUBJECTS]
)
def test_the_doctor_finds_it_healthy(name, monkeypatch, tmp_path):
    monkeypatch.setattr("tests.zoo.certificates.REPORTS", tmp_path)
    report = examine(name)
    assert certified(report), row(name, report)
    assert len(report["paths"]) == (10 if "--tp" in SUBJECTS[name].arguments else 8)
