"""What a session's agent finds in its workspace and network: files, memory, skills, repositories, packages, hosts.

A process is started before its session is known, so nothing can be bound into its sandbox later. Instead every slot of
an agent has standing places (`places`), below which the server puts things before a turn and looks after one
(`furnish`). What lies there already is noted in the workspace itself (`manifest`), so that it moves with snapshots.
"""
