"""Broken recipes and damaged files by the thousand: each ends in a message and an exit status, never in a traceback."""
