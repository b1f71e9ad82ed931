"""Pages of a report: terminal, Markdown, HTML, model card, plots. They read report.json and nothing else."""
