"""How many draft tokens each decoding row gets in a step (prompt_lookup.py proposes them)."""

from server.engine.scheduling.row import Row
from server.engine.scheduling.row_resources import RowResources
from server.engine.scheduling.step_cost import StepCost

MAX_DRAFT_TOKENS = 48  # in one step, of all rows


class Drafts:
    """The draft tokens of one step, shared out row by row."""

    def __init__(
        self, resources: RowResources, cost: StepCost, rows: int, spare_tokens: int, max_row_draft: int
    ) -> None:
        """`rows` rows decode; drafts may use `spare_tokens` of the step."""
        self._resources = resources
        self._max_row_draft = max_row_draft
        self._rows = rows
        self._left = max(0, min(MAX_DRAFT_TOKENS, spare_tokens, max_row_draft * rows))
        self._min_acceptance = cost.min_acceptance(rows, self._left)

    def add(self, row: Row) -> None:
        """Schedule the row's part, if the tokens are likely enough and there are free blocks for them."""
        limit = min(
            self._left // self._rows,
            self._max_row_draft,
            row.remaining_output(self._resources.max_context) - 1,
            self._resources.tokens_until_rope_switch(row),
        )
        self._rows -= 1
        if row.grammar or limit < 1:
            return
        draft = row.lookup.draft(row.tokens, limit, self._min_acceptance)
        if self._resources.reserve_blocks(row, row.computed + 1 + len(draft)):
            row.draft = draft
            row.scheduled += len(draft)
            self._left -= len(draft)
