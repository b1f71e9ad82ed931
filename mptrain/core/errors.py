"""Errors a user can act on: each message says what was wrong and what to do about it.

The command line prints the message alone (no traceback) and exits with `exit_code`.
"""

from __future__ import annotations


class MptrainError(Exception):
    """A failure during a run (exit status 1)."""

    exit_code = 1


class UserError(MptrainError):
    """Wrong input: a recipe, a path, a column, an option (exit status 2)."""

    exit_code = 2


class RecipeError(UserError):
    """The recipe is not valid; the message names the field, the line, the value and the fix."""


class DataError(UserError):
    """The data cannot be used as the recipe says: missing column, empty split, unknown label."""


class ModelError(UserError):
    """The model cannot be loaded or has no structure of the kind a method needs."""


class ResumeError(UserError):
    """The run folder holds a run that differs from the recipe; the message names the field."""


class DownloadError(MptrainError):
    """A pinned file could not be fetched or its hash differs."""


class TrainingError(MptrainError):
    """Training broke: a non-finite loss, a failing rank."""


class ExportError(MptrainError):
    """A model could not be exported, or the exported file does not do what the model does."""


class NotFinite(ExportError):
    """Outputs of a model, exported or not, that are inf or not a number: nothing can be scored or compared."""


class GateFailed(MptrainError):
    """The run is whole, but a gate of the recipe was missed (exit status 3)."""

    exit_code = 3


def out_of_memory(error: BaseException) -> bool:
    """Libraries in other languages raise errors of their own kinds, so the text decides."""
    texts = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in texts)
