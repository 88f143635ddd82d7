"""The paper's experiments, each a set of cells that can be interrupted, resumed and reported."""

# Name to a module with ``run(only, scale, data, out, workers)``.
SUITES = {"optim": "nestlearn.tasks.optim", "speed": "nestlearn.tasks.speed"}  # of `nestlearn bench`
EVALUATIONS = {  # of `nestlearn eval --suite`
    "core": "nestlearn.tasks.core",
    "continual": "nestlearn.tasks.continual",
}
