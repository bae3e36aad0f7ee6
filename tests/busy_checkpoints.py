"""Imported by a server of crash_tools: every epoch is saved, however quick it was."""

import kdcli.training.fit

kdcli.training.fit.CHECKPOINT_SECONDS = 0.0
