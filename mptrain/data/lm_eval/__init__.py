"""Multiple-choice task files of lm-evaluation-harness: `task_file` reads them, `rows` their data, `questions` score."""
