"""Rate limits, concurrency and budgets; `admission` asks them in order."""
