"""Husk beside containerd + runc: same host, same client, same images, one run."""
