"""The paper's experiments, each a set of cells that can be interrupted, resumed and reported."""

SUITES = {"optim": "nestlearn.tasks.optim"}  # name to a module with ``run(only, scale, data, out, workers)``
