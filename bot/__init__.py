"""The service around Guppy: the adapters to the chat platforms, the queue, and the worker."""
