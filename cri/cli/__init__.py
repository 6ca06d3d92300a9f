"""The verbs of the `husk` command other than `serve`."""
