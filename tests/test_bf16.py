"""bfloat16: the error against float64 does not grow with the number of ranks."""

import json
from pathlib import Path

from benchmarks.bf16_error import DRIFTING, LAYOUTS, SIZES, TENSORS, Row, measure, table, worst
from matrix import LAYOUTS as ALL
from world import Worlds


def test_bfloat16_does_not_drift_with_the_ranks(world: Worlds) -> None:
    rows, *rest = world(max(SIZES))(measure)
    assert rest == [[]] * (max(SIZES) - 1)
    assert {r.layout for r in rows} == {*ALL, DRIFTING}
    for name in LAYOUTS:
        assert worst(rows, name) <= 1.1, f"{name} drifts:\n{table(rows)}"
    # what would be seen if partial results were rounded: the test can fail
    assert worst(rows, DRIFTING) > 1.2, table(rows)
    for tensor in TENSORS:
        sums = [getattr(r, tensor) for r in rows if r.layout == DRIFTING]
        assert sums[-1] > 1.1 * sums[0], f"{tensor}:\n{table(rows)}"
    assert len(table(rows).splitlines()) == 2 + len(TENSORS) * (len(LAYOUTS) + 1)


def test_the_docs_hold_the_measured_table() -> None:
    root = Path(__file__).parent.parent
    rows = json.loads((root / "benchmarks" / "results" / "bf16.json").read_text())["rows"]
    found = table([Row(**row) for row in rows])
    assert found in (root / "docs" / "layouts.md").read_text(), "write what benchmarks.bf16_error prints"
