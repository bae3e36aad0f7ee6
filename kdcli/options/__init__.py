"""Options: declared once as pydantic fields, resolved from flags, files and defaults."""
