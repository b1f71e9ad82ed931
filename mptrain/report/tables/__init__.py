"""The tables of a report, as cells: results, models, choices."""
