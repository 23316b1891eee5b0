"""The Managed Agents API: agents, environments, sessions and what they are made of."""
