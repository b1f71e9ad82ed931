"""Models as modules: `load` reads them, `head` and `samples` what is known before a run, `artifact` saves and loads."""
