"""Near-duplicates across data sets, by perceptual hash (P1 section 3)."""

from kdcli.auditing.result import AuditResult as AuditResult
from kdcli.auditing.step import audit as audit
