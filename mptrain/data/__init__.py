"""From a recipe's `data` to examples: `load` makes the task, `sources` read tables, `tasks` say what they mean."""
