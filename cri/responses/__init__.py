"""Records and usage as messages of the CRI. Pure but for the list cache."""
