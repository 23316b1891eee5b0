"""From a request to a `Principal`: who asks."""
