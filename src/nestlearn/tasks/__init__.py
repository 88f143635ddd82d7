"""The paper's experiments, each a set of cells that can be interrupted, resumed and reported."""

# Name to a module with ``run(only, scale, data, out, workers)``.
SUITES = {"optim": "nestlearn.tasks.optim"}  # of `nestlearn bench`
EVALUATIONS = {"core": "nestlearn.tasks.core"}  # of `nestlearn eval --suite`
