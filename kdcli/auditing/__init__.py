"""Near-duplicates across data sets, by perceptual hash (P1 section 3)."""

from kdcli.auditing.audit import audit as audit
from kdcli.auditing.result import AuditResult as AuditResult
