"""A small run, not trained, and what it exports."""

import copy
import pathlib
import types

import pytest

ROWS = (64,)
"""Of blocks, everywhere: few programs."""


@pytest.fixture(scope="session")
def exported(fields, tmp_path_factory) -> types.SimpleNamespace:
    """A run, its state, and the folder that it exports."""
    from xmc_jax.config import RunConfig
    from xmc_jax.shipping import exporting
    from xmc_jax.training import build

    fields = copy.deepcopy(fields)
    fields["name"] = "topics"
    fields["prime"] |= {"combiner": "sum", "free_vectors": 64}
    run = build.run(RunConfig.from_dict(fields))
    state = run.initial_state()
    folder = exporting.whole(run, 0, state, tmp_path_factory.mktemp("run"))
    return types.SimpleNamespace(
        fields=fields, run=run, state=state, folder=pathlib.Path(str(folder))
    )


@pytest.fixture(scope="session")
def predictor(exported):
    from xmc_jax.shipping.predictor import Predictor

    return Predictor.open(exported.folder)


@pytest.fixture(scope="module")
def queries(exported):
    """The test documents, and what the filter takes from each."""
    from xmc_jax.shipping.predictor import Query

    data = exported.run.data
    ids, excluded = data.uids("label"), [[] for _ in range(data.num_test)]
    for document, label in data.filter("test"):
        excluded[document].append(ids[label])
    return [Query(text, exclude=some) for text, some in zip(data.texts("test"), excluded)]
