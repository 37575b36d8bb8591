"""The table of a sweep."""

from __future__ import annotations

import json

from ecgscale_launch.sweep_table import figures


def test_a_run_has_ended_also_where_its_export_stands_aside(tmp_path) -> None:
    """As a process leaves it that is killed while it replaces the export."""
    (tmp_path / "events.jsonl").write_text(json.dumps({"event": "step", "step": 1, "train/loss": 2.5}) + "\n")
    assert figures(tmp_path) == {}
    (tmp_path / "export.before").mkdir()
    assert figures(tmp_path) == {"train/loss": 2.5}
