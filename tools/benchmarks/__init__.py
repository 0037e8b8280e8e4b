"""What the benchmarks of tools and projects are made of."""
