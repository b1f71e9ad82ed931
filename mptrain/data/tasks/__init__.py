"""What a row means: a file to each task with its columns, batches, scores and agreement; `base` is the contract."""
