"""Husk beside containerd + runc: the same host, client and images, in one run."""
