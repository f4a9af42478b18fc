"""Data room: one Example schema, the benchmarks' loaders, prompts and encoding."""
