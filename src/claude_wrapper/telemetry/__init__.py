"""What the server says about itself: logs, metrics, traces, and the redaction that all three go through."""
