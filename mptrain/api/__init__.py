"""Python in a few lines: what a recipe's stage and the commands do, on a model in memory, by the functions they use.

`given` is what a caller hands over (a model, batches, a data set), `shown` how what comes back prints itself.
"""
