"""`python -m claude_wrapper.cli`."""

from claude_wrapper.cli import main

main()
