"""Studies that were edited by hand are refused in words."""

from __future__ import annotations

import math

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from superlora.search import Space, search
from superlora.search.sampler import Parameters

SPACE = Space({"q": (3, 2)}, ranks=(2,))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"value": math.inf}, "values"),
        ({"value": 1.0, "user_attrs": {"label": [3]}}, "label"),
        ({"value": 1.0, "system_attrs": {"fixed_params": [3]}}, "fixed_params"),
    ],
)
def test_trials_that_no_search_has_written(fields, field):
    storage = optuna.storages.InMemoryStorage()
    search(lambda _: 0.5, SPACE, storage=storage, trials=3)
    study = optuna.load_study(study_name="superlora", storage=storage)
    parameters = Parameters(SPACE)
    made = create_trial(
        state=TrialState.COMPLETE,
        params=parameters.encoded([0] * len(parameters.distributions)),
        distributions=parameters.distributions,
        **fields,
    )
    study.add_trial(made)
    with pytest.raises(ValueError, match=f"trial 3 of study 'superlora' has {field}"):
        search(lambda _: 0.5, SPACE, storage=storage, trials=6)
