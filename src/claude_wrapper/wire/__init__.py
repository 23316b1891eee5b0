"""Sans-IO wire formats: bytes and dicts in, typed events out. Nothing here opens a file, a socket or a process."""
