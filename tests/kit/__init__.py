"""What the tests and the benchmark share: a private network, a registry, images, CRI clients, daemons.

Everything that the kit starts or creates carries the name of one scratch directory (`kit.scratch`), by which
`kit.leaks` finds what is left of a run.
"""
