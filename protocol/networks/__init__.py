"""Networks of many agents: stacked, and what their first layers see."""
