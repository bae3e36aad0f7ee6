"""One self-contained HTML page of what was run and what came out: no server, no network."""

from kdcli.reporting.summary import write_report
from kdcli.reporting.values import Report, ReportRow

__all__ = ["Report", "ReportRow", "write_report"]
