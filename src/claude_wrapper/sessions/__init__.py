"""Conversations: which process holds them, how their turns run, and how an ordinary stateless client finds its own."""
