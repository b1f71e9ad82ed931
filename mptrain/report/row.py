"""A row of a report: what report.json holds of one variant, phase, gate or plot, as JSON values by name."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
