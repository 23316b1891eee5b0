"""Sessions whose tools run at the customer's: the queue of work, and the tools that are offered to the model."""
