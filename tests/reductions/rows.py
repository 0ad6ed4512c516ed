"""The table: every method against every peer that has it; a new one is one more row."""

from __future__ import annotations

from tests.reductions import (
    lycoris_rows,
    paper_block_rows,
    paper_few_rows,
    paper_map_rows,
    paper_separable_rows,
    paper_shared_rows,
    paper_train_rows,
    paper_weight_rows,
    peft_block_rows,
    peft_map_rows,
    peft_rows,
)
from tests.reductions.cases import Row

TABLES = (
    peft_rows,
    peft_map_rows,
    peft_block_rows,
    lycoris_rows,
    paper_shared_rows,
    paper_train_rows,
    paper_weight_rows,
    paper_block_rows,
    paper_map_rows,
    paper_separable_rows,
    paper_few_rows,
)
ROWS: dict[str, Row] = {row.name: row for table in TABLES for row in table.ROWS}
