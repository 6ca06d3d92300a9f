"""The rpcs of the CRI, one file per concern."""
