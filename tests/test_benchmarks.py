"""Every benchmark runs in its smallest size, and the tables of the pages are those of the results."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import report  # noqa: E402

SAME_LOSS = {"npass": "group", "groups": "group", "growth": "turns", "split": None}  # rows that agree in this
NAMES = sorted(path.stem for path in (BENCHMARKS / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_smallest_size(name, tmp_path):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "smoke", "--output_dir", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=BENCHMARKS.parent)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / f"{name}_smoke.json").read_text())
    assert result["rows"] and not [row for row in result["rows"] if "error" in row]
    assert {"command", "commit", "date", "machine", "versions", "settings", "seconds"} <= set(result)
    assert (tmp_path / f"{name}_smoke.png").stat().st_size
    if name == "loss_memory":
        assert [row["value"] for row in result["rows"]] == pytest.approx([result["rows"][0]["value"]] * 3, rel=1e-6)
    if name in SAME_LOSS:  # what is compared in speed trains the same
        losses = {}
        for row in result["rows"]:
            losses.setdefault(row.get(SAME_LOSS[name]), []).append(row["loss"])
        for of_one in losses.values():
            assert len(of_one) > 1 and of_one == pytest.approx([of_one[0]] * len(of_one), rel=1e-5)
    for table in [name] * (name in report.TABLES) + ["headline"] * (name == "npass"):
        for some in (result, result | {"rows": result["rows"][:1], "interrupted": True}):  # stopped after a row
            head, *rows = report.TABLES[table](some)
            assert (rows or table == "headline") and all(len(row) == len(head) for row in rows)


@pytest.mark.parametrize("page", report.PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_tables_of_the_pages_are_those_of_the_results(page):
    """A figure in a table that no result file has."""
    text = page.read_text()
    assert report.render(text) == text, "run python benchmarks/report.py"
    assert len(re.findall(r"<!-- table: \w+ -->", text)) == len(report.MARKED.findall(text)) > 0
