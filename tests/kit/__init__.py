"""What the tests and the benchmark share: a private network, a registry, images, CRI clients, daemons.

Everything that the kit starts or makes carries the name of one scratch directory (`kit.scratch`), so
`kit.leaks` can tell what is left of it without looking at anything else on the machine.
"""
