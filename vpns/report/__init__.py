"""The report of a run: its numbers as JSON and CSV, plots of them, and a text for people."""

from vpns.report.write import write_report

__all__ = ["write_report"]
