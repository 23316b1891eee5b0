"""What sessions are made of: agents, environments, files, vaults for tools, skills, memory stores."""
