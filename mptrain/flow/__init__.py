"""The steps of a run: preflight, stages, variants; its folder, identity and what may be reused."""
