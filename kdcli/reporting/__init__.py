"""One self-contained HTML page of what was run and what came out: no server, no network."""
